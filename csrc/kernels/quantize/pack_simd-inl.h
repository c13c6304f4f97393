// SPDX-License-Identifier: Apache-2.0
// Codes one in a uint8 (FP12: a uint16) to and from the stream of bits of quantize.h, Note [layout]. `codes` and `data` do not overlap;
// nothing beyond `count` codes or their bytes is read or written.
// Included once per instruction set, after hwy/highway.h.
#if defined(DS_KERNELS_QUANTIZE_PACK_SIMD_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef DS_KERNELS_QUANTIZE_PACK_SIMD_INL_H_
#undef DS_KERNELS_QUANTIZE_PACK_SIMD_INL_H_
#else
#define DS_KERNELS_QUANTIZE_PACK_SIMD_INL_H_
#endif

#include "kernels/quantize/quantize.h"

HWY_BEFORE_NAMESPACE();
namespace ds::kernels::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// The last codes: whole bytes are few enough to go one at a time.
template <int kBits, class Code>
void pack_rest(const Code* codes, int64_t count, uint8_t* data) {
  uint32_t held = 0;
  int bits = 0;
  for (int64_t i = 0; i < count; ++i) {
    held |= static_cast<uint32_t>(codes[i]) << bits;
    for (bits += kBits; bits >= 8; bits -= 8, held >>= 8) *data++ = static_cast<uint8_t>(held);
  }
  if (bits > 0) *data = static_cast<uint8_t>(held);
}
template <int kBits, class Code>
void unpack_rest(const uint8_t* data, int64_t count, Code* codes) {
  uint32_t held = 0;
  int bits = 0;
  for (int64_t i = 0; i < count; ++i) {
    for (; bits < kBits; bits += 8) held |= static_cast<uint32_t>(*data++) << bits;
    codes[i] = static_cast<Code>(held & ((1u << kBits) - 1u));
    held >>= kBits;
    bits -= kBits;
  }
}

#if HWY_TARGET != HWY_SCALAR
using Block8 = hn::Full128<uint8_t>;
using Block16 = hn::Full128<uint16_t>;
using Block32 = hn::Full128<uint32_t>;

// The numbers of kField bits in the two halves of a word, side by side at its bottom; and back.
template <int kField, class D>
HWY_INLINE hn::Vec<D> join_halves(D d, hn::Vec<D> v) {
  constexpr int kHalf = static_cast<int>(sizeof(hn::TFromD<D>)) * 4;
  const auto low = hn::And(v, hn::Set(d, static_cast<hn::TFromD<D>>((1u << kField) - 1u)));
  return hn::Or(low, hn::ShiftLeft<kField>(hn::ShiftRight<kHalf>(v)));
}
template <int kField, class D>
HWY_INLINE hn::Vec<D> split_halves(D d, hn::Vec<D> v) {
  constexpr int kHalf = static_cast<int>(sizeof(hn::TFromD<D>)) * 4;
  const auto mask = hn::Set(d, static_cast<hn::TFromD<D>>((1u << kField) - 1u));
  return hn::Or(hn::And(v, mask), hn::ShiftLeft<kHalf>(hn::And(hn::ShiftRight<kField>(v), mask)));
}

alignas(16) constexpr uint8_t kDropFourth[16] = {0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, 0x80, 0x80, 0x80, 0x80};
alignas(16) constexpr uint8_t kAddFourth[16] = {0, 1, 2, 0x80, 3, 4, 5, 0x80, 6, 7, 8, 0x80, 9, 10, 11, 0x80};
#endif

template <int kBits>
struct Packing;

template <>
struct Packing<4> {
  static void pack(const uint8_t* codes, int64_t count, uint8_t* data) {
    int64_t i = 0;
#if HWY_TARGET != HWY_SCALAR
    const hn::ScalableTag<uint16_t> d16;
    const hn::Repartition<uint8_t, decltype(d16)> d8;
    const hn::Rebind<uint8_t, decltype(d16)> half;
    const int64_t step = static_cast<int64_t>(hn::Lanes(d8));
    for (; i + step <= count; i += step) {
      const auto pairs = hn::BitCast(d16, hn::LoadU(d8, codes + i));
      const auto joined = hn::And(hn::Or(pairs, hn::ShiftRight<4>(pairs)), hn::Set(d16, uint16_t{0xff}));
      hn::StoreU(hn::DemoteTo(half, hn::BitCast(hn::RebindToSigned<decltype(d16)>(), joined)), half, data + i / 2);
    }
#endif
    pack_rest<4>(codes + i, count - i, data + i / 2);
  }
  static void unpack(const uint8_t* data, int64_t count, uint8_t* codes) {
    int64_t i = 0;
#if HWY_TARGET != HWY_SCALAR
    const hn::ScalableTag<uint16_t> d16;
    const hn::Repartition<uint8_t, decltype(d16)> d8;
    const hn::Rebind<uint8_t, decltype(d16)> half;
    const int64_t step = static_cast<int64_t>(hn::Lanes(d8));
    for (; i + step <= count; i += step) {
      const auto bytes = hn::PromoteTo(d16, hn::LoadU(half, data + i / 2));
      const auto pairs = hn::And(hn::Or(bytes, hn::ShiftLeft<4>(bytes)), hn::Set(d16, uint16_t{0x0f0f}));
      hn::StoreU(hn::BitCast(d8, pairs), d8, codes + i);
    }
#endif
    unpack_rest<4>(data + i / 2, count - i, codes + i);
  }
};

// Words of four bytes whose fourth is zero lose and regain it by a shuffle of 16 bytes, of which 12 count: the loops end before the four
// others would touch what is not ours.
template <>
struct Packing<6> {
  static void pack(const uint8_t* codes, int64_t count, uint8_t* data) {
    int64_t i = 0;
#if HWY_TARGET != HWY_SCALAR
    for (; i + 22 <= count; i += 16) {
      const auto pairs = join_halves<6>(Block16(), hn::BitCast(Block16(), hn::LoadU(Block8(), codes + i)));
      const auto words = hn::BitCast(Block8(), join_halves<12>(Block32(), hn::BitCast(Block32(), pairs)));
      hn::StoreU(hn::TableLookupBytesOr0(words, hn::Load(Block8(), kDropFourth)), Block8(), data + i / 4 * 3);
    }
#endif
    pack_rest<6>(codes + i, count - i, data + i / 4 * 3);
  }
  static void unpack(const uint8_t* data, int64_t count, uint8_t* codes) {
    int64_t i = 0;
#if HWY_TARGET != HWY_SCALAR
    for (; i + 22 <= count; i += 16) {
      const auto bytes = hn::TableLookupBytesOr0(hn::LoadU(Block8(), data + i / 4 * 3), hn::Load(Block8(), kAddFourth));
      const auto pairs = split_halves<12>(Block32(), hn::BitCast(Block32(), bytes));
      hn::StoreU(hn::BitCast(Block8(), split_halves<6>(Block16(), hn::BitCast(Block16(), pairs))), Block8(), codes + i);
    }
#endif
    unpack_rest<6>(data + i / 4 * 3, count - i, codes + i);
  }
};

template <>
struct Packing<12> {
  static void pack(const uint16_t* codes, int64_t count, uint8_t* data) {
    int64_t i = 0;
#if HWY_TARGET != HWY_SCALAR
    for (; i + 11 <= count; i += 8) {
      const auto pairs = hn::LoadU(Block16(), codes + i);
      const auto words = hn::BitCast(Block8(), join_halves<12>(Block32(), hn::BitCast(Block32(), pairs)));
      hn::StoreU(hn::TableLookupBytesOr0(words, hn::Load(Block8(), kDropFourth)), Block8(), data + i / 2 * 3);
    }
#endif
    pack_rest<12>(codes + i, count - i, data + i / 2 * 3);
  }
  static void unpack(const uint8_t* data, int64_t count, uint16_t* codes) {
    int64_t i = 0;
#if HWY_TARGET != HWY_SCALAR
    for (; i + 11 <= count; i += 8) {
      const auto bytes = hn::TableLookupBytesOr0(hn::LoadU(Block8(), data + i / 2 * 3), hn::Load(Block8(), kAddFourth));
      hn::StoreU(hn::BitCast(Block16(), split_halves<12>(Block32(), hn::BitCast(Block32(), bytes))), Block16(), codes + i);
    }
#endif
    unpack_rest<12>(data + i / 2 * 3, count - i, codes + i);
  }
};

}  // namespace ds::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
