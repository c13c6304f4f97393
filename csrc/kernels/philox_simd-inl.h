// SPDX-License-Identifier: Apache-2.0
// philox.h in vectors. Every 128-bit block holds the four words of one counter, so that one widening multiply of the even words does both
// products of a round and the words come out in the order of the elements they belong to.
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
  // elements at a time). The dependent chains of several vectors overlap.
  template <int kCount>
  HWY_INLINE void draw(uint64_t element, Words (&out)[kCount]) const {
    static_assert(kCount % 4 == 0, "one group of four at a time");
    const D d;
    const D64 d64;
    const auto multipliers = pair(kPhiloxMultiplier0, kPhiloxMultiplier1);
    uint64_t start[kCount * kWords / 2];
    for (int64_t j = 0; j < kCount * kWords / 4; ++j) {
      start[2 * j] = low_;
      start[2 * j + 1] = element / 4 + static_cast<uint64_t>(j);
    }
    for (int v = 0; v < kCount; ++v) out[v] = hn::BitCast(d, hn::LoadU(d64, start + v * (kWords / 2)));
    for (int r = 0; r < kPhiloxRounds; ++r) {
      const auto key = pair(keys_[r][0], keys_[r][1]);
      for (int v = 0; v < kCount; ++v) {
        const auto product = hn::BitCast(d, hn::MulEven(out[v], multipliers));          // lo0 hi0 lo1 hi1
        const auto rest = hn::BitCast(d, hn::ShiftRight<32>(hn::BitCast(d64, out[v])));  // c1 0 c3 0
        out[v] = hn::Xor3(hn::Shuffle0123(product), rest, key);                           // hi1 lo1 hi0 lo0 ^ ...
      }
    }
  }
#endif

  // out[0..n) = the words of elements first .. first + n - 1; first is a multiple of 4.
  HWY_INLINE void fill(uint64_t first, int64_t n, uint32_t* out) const {
    constexpr int kChains = 4;
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
  // a 0 b 0 in every block.
  static HWY_INLINE Words pair(uint32_t a, uint32_t b) {
    const D d;
    const D64 d64;
    const auto first = hn::BitCast(d, hn::Set(d64, a));
    const auto second = hn::BitCast(d, hn::Set(d64, b));
    return hn::BitCast(d, hn::OddEven(hn::BitCast(d64, second), hn::BitCast(d64, first)));
  }

  uint64_t low_;
  uint32_t keys_[kPhiloxRounds][2];
#endif
};

}  // namespace ds::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
