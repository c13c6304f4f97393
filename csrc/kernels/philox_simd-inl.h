// SPDX-License-Identifier: Apache-2.0
// philox.h in vectors. A lane of 64 bits has one counter; each of its four words has a vector of its own, so that a round is two widening
// multiplications, two shifts and two exclusive ors, and no bytes travel between lanes until the words are put in the order of their elements.
// Included once per instruction set, after hwy/highway.h.
#if defined(DS_KERNELS_PHILOX_SIMD_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef DS_KERNELS_PHILOX_SIMD_INL_H_
#undef DS_KERNELS_PHILOX_SIMD_INL_H_
#else
#define DS_KERNELS_PHILOX_SIMD_INL_H_
#endif

#include <cstring>

#include "kernels/philox.h"

HWY_BEFORE_NAMESPACE();
namespace ds::kernels::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

class PhiloxVectors {
  using D = hn::ScalableTag<uint32_t>;
  using D64 = hn::ScalableTag<uint64_t>;
  using Wide = hn::Vec<D64>;

 public:
  using Words = hn::Vec<D>;
  static constexpr int64_t kWords = static_cast<int64_t>(hn::MaxLanes(D()));  // elements a vector serves

#if HWY_TARGET == HWY_SCALAR
  PhiloxVectors(uint64_t seed, uint64_t offset) : seed_(seed), offset_(offset) {}

  template <int kCount>
  HWY_INLINE void draw(uint64_t element, Words (&out)[kCount]) const {
    static_assert(kCount % 4 == 0, "one group of four at a time");
    for (int v = 0; v < kCount; v += 4) {
      const UInt32x4 group = philox_group(seed_, offset_, element / 4 + static_cast<uint64_t>(v / 4));
      for (int k = 0; k < 4; ++k) out[v + k] = hn::Set(D(), group.word[k]);
    }
  }
#else
  PhiloxVectors(uint64_t seed, uint64_t offset) : low_(offset / 4) {
    for (int r = 0; r < kPhiloxRounds; ++r) {
      const uint32_t k0 = static_cast<uint32_t>(seed) + static_cast<uint32_t>(r) * kPhiloxWeyl0;
      const uint32_t k1 = static_cast<uint32_t>(seed >> 32) + static_cast<uint32_t>(r) * kPhiloxWeyl1;
      keys_[r][0] = k0;
      keys_[r][1] = k1;
    }
  }

  // The words of elements [element, element + kCount * kWords); element is a multiple of 4, and so is kCount (plain scalar code draws four
  // elements at a time). The dependent chains of several vectors overlap. Two vectors of words are made together, from as many counters as
  // they have lanes of 64 bits: of words 0 and 2 each lane's lower half counts, and so it is with words 1 and 3, which are whole products.
  template <int kCount>
  HWY_INLINE void draw(uint64_t element, Words (&out)[kCount]) const {
    static_assert(kCount % 4 == 0, "one group of four at a time");
    constexpr int kPairs = kCount / 2;
    const D d;
    const D64 d64;
    const auto multiplier0 = hn::Set(d, kPhiloxMultiplier0), multiplier1 = hn::Set(d, kPhiloxMultiplier1);
    alignas(64) uint64_t order[kWords / 2];  // the counters of the first vector in the even lanes, where interleaving takes them from
    for (int64_t lane = 0; lane < kWords / 2; ++lane) order[lane] = static_cast<uint64_t>(lane % 2 * (kWords / 4) + lane / 2);
    Wide c0[kPairs], c1[kPairs], c2[kPairs], c3[kPairs];
    for (int v = 0; v < kPairs; ++v) {
      c0[v] = hn::Set(d64, low_);
      c1[v] = hn::Set(d64, low_ >> 32);
      c2[v] = hn::Add(hn::LoadU(d64, order), hn::Set(d64, element / 4 + static_cast<uint64_t>(v * (kWords / 2))));
      c3[v] = hn::ShiftRight<32>(c2[v]);
    }
    for (int r = 0; r < kPhiloxRounds; ++r) {
      const auto key0 = hn::Set(d64, keys_[r][0]), key1 = hn::Set(d64, keys_[r][1]);
      for (int v = 0; v < kPairs; ++v) {
        const auto p0 = hn::MulEven(hn::BitCast(d, c0[v]), multiplier0), p1 = hn::MulEven(hn::BitCast(d, c2[v]), multiplier1);
        c0[v] = hn::Xor3(hn::ShiftRight<32>(p1), c1[v], key0);
        c2[v] = hn::Xor3(hn::ShiftRight<32>(p0), c3[v], key1);
        c1[v] = p1;
        c3[v] = p0;
      }
    }
    for (int v = 0; v < kPairs; ++v) {
      const auto words01 = hn::BitCast(d64, hn::OddEven(hn::BitCast(d, hn::ShiftLeft<32>(c1[v])), hn::BitCast(d, c0[v])));
      const auto words23 = hn::BitCast(d64, hn::OddEven(hn::BitCast(d, hn::ShiftLeft<32>(c3[v])), hn::BitCast(d, c2[v])));
      out[2 * v] = hn::BitCast(d, hn::InterleaveLower(d64, words01, words23));
      out[2 * v + 1] = hn::BitCast(d, hn::InterleaveUpper(d64, words01, words23));
    }
  }
#endif

  // out[0..n) = the words of elements first .. first + n - 1; first is a multiple of 4.
  HWY_INLINE void fill(uint64_t first, int64_t n, uint32_t* out) const {
    constexpr int kChains = 8;
    constexpr int64_t kStep = kChains * kWords;
    const D d;
    Words words[kChains];
    int64_t i = 0;
    for (; i + kStep <= n; i += kStep) {
      draw(first + static_cast<uint64_t>(i), words);
      for (int v = 0; v < kChains; ++v) hn::StoreU(words[v], d, out + i + v * kWords);
    }
    if (i >= n) return;
    uint32_t rest[kStep];
    draw(first + static_cast<uint64_t>(i), words);
    for (int v = 0; v < kChains; ++v) hn::StoreU(words[v], d, rest + v * kWords);
    std::memcpy(out + i, rest, static_cast<size_t>(n - i) * sizeof(uint32_t));
  }

 private:
#if HWY_TARGET == HWY_SCALAR
  uint64_t seed_, offset_;
#else
  uint64_t low_;
  uint32_t keys_[kPhiloxRounds][2];
#endif
};

}  // namespace ds::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
