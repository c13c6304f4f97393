// SPDX-License-Identifier: Apache-2.0
// Loads and stores of float32 vectors in the storage formats of dispatch.h. The bits are those of base/dtype.h.
// Included once per instruction set, after hwy/highway.h.
#if defined(DS_KERNELS_SIMD_FORMAT_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef DS_KERNELS_SIMD_FORMAT_INL_H_
#undef DS_KERNELS_SIMD_FORMAT_INL_H_
#else
#define DS_KERNELS_SIMD_FORMAT_INL_H_
#endif

#include "kernels/dispatch.h"

HWY_BEFORE_NAMESPACE();
namespace ds::kernels::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using FloatTag = hn::ScalableTag<float>;
using V = hn::Vec<FloatTag>;
constexpr int64_t kLanes = static_cast<int64_t>(hn::MaxLanes(FloatTag()));  // floats in a vector

// The machine converts half precision itself; elsewhere it is spelled out in integers.
#if HWY_TARGET <= HWY_AVX2 && HWY_ARCH_X86 && !defined(HWY_DISABLE_F16C)
#define DS_HARDWARE_F16 1
#else
#define DS_HARDWARE_F16 0
#endif

HWY_INLINE V load_as(F32, const float* p) { return hn::LoadU(FloatTag(), p); }
HWY_INLINE void store_as(F32, V v, float* p) { hn::StoreU(v, FloatTag(), p); }

HWY_INLINE V load_as(BF16, const uint16_t* p) {
  const hn::Rebind<uint16_t, FloatTag> du16;
  const hn::Rebind<uint32_t, FloatTag> du32;
  return hn::BitCast(FloatTag(), hn::ShiftLeft<16>(hn::PromoteTo(du32, hn::LoadU(du16, p))));
}

// The low 16 bits of every 32-bit lane; the high ones must be zero.
template <class U>
HWY_INLINE void store_low_halves(U bits, uint16_t* p) {
  const hn::Rebind<uint16_t, FloatTag> du16;
  const hn::Rebind<int32_t, FloatTag> di32;
  hn::StoreU(hn::DemoteTo(du16, hn::BitCast(di32, bits)), du16, p);
}

HWY_INLINE void store_as(BF16, V v, uint16_t* p) {
  const hn::Rebind<uint32_t, FloatTag> du32;
  const auto u = hn::BitCast(du32, v);
  const auto high = hn::ShiftRight<16>(u);
  const auto odd = hn::And(high, hn::Set(du32, 1));
  const auto rounded = hn::ShiftRight<16>(hn::Add(u, hn::Add(odd, hn::Set(du32, 0x7fff))));
  const auto nan = hn::RebindMask(du32, hn::IsNaN(v));
  store_low_halves(hn::IfThenElse(nan, hn::Or(high, hn::Set(du32, 0x40)), rounded), p);
}

#if DS_HARDWARE_F16

HWY_INLINE V load_as(F16, const uint16_t* p) {
  const hn::Rebind<uint16_t, FloatTag> du16;
  const hn::Rebind<hwy::float16_t, FloatTag> df16;
  return hn::PromoteTo(FloatTag(), hn::BitCast(df16, hn::LoadU(du16, p)));
}
HWY_INLINE void store_as(F16, V v, uint16_t* p) {
  const hn::Rebind<uint16_t, FloatTag> du16;
  const hn::Rebind<hwy::float16_t, FloatTag> df16;
  hn::StoreU(hn::BitCast(du16, hn::DemoteTo(df16, v)), du16, p);
}

#else

HWY_INLINE V load_as(F16, const uint16_t* p) {
  const FloatTag df;
  const hn::Rebind<uint16_t, FloatTag> du16;
  const hn::Rebind<uint32_t, FloatTag> du32;
  const hn::Rebind<int32_t, FloatTag> di32;
  const auto h = hn::PromoteTo(du32, hn::LoadU(du16, p));
  const auto sign = hn::ShiftLeft<16>(hn::And(h, hn::Set(du32, 0x8000)));
  const auto exponent = hn::And(h, hn::Set(du32, 0x7c00));
  const auto mantissa = hn::And(h, hn::Set(du32, 0x3ff));
  const auto subnormal =  // mantissa * 2^-24, exact
      hn::BitCast(du32, hn::Mul(hn::ConvertTo(df, hn::BitCast(di32, mantissa)), hn::Set(df, 5.9604644775390625e-8f)));
  const auto shifted = hn::ShiftLeft<13>(hn::Or(exponent, mantissa));
  const auto normal = hn::Add(shifted, hn::Set(du32, 112u << 23));
  const auto quiet = hn::IfThenElseZero(hn::Ne(mantissa, hn::Zero(du32)), hn::Set(du32, 0x400000));
  const auto special = hn::Or(hn::Or(shifted, quiet), hn::Set(du32, 0x7f800000));
  const auto finite = hn::IfThenElse(hn::Eq(exponent, hn::Zero(du32)), subnormal, normal);
  const auto all = hn::IfThenElse(hn::Eq(exponent, hn::Set(du32, 0x7c00)), special, finite);
  return hn::BitCast(df, hn::Or(sign, all));
}

// The cases of base/dtype.h: float_to_f16, chosen lane by lane.
HWY_INLINE void store_as(F16, V v, uint16_t* p) {
  const FloatTag df;
  const hn::Rebind<int32_t, FloatTag> di;  // magnitudes are positive, so signed comparisons do
  const auto u = hn::BitCast(di, v);
  const auto magnitude = hn::And(u, hn::Set(di, 0x7fffffff));
  const auto sign = hn::And(hn::ShiftRight<16>(u), hn::Set(di, 0x8000));
  const auto mantissa = hn::ShiftRight<13>(magnitude);
  const auto odd = hn::And(mantissa, hn::Set(di, 1));
  const auto normal =
      hn::ShiftRight<13>(hn::Add(hn::Sub(magnitude, hn::Set(di, 0x38000000 - 0xfff)), odd));
  const auto tiny = hn::Sub(hn::BitCast(di, hn::Add(hn::BitCast(df, magnitude), hn::Set(df, 0.5f))),
                            hn::Set(di, 0x3f000000));
  const auto nan = hn::Or(hn::Set(di, 0x7e00), hn::And(mantissa, hn::Set(di, 0x3ff)));
  auto h = hn::IfThenElse(hn::Lt(magnitude, hn::Set(di, 0x38800000)), tiny, normal);
  h = hn::IfThenElse(hn::Gt(magnitude, hn::Set(di, 0x477fefff)), hn::Set(di, 0x7c00), h);
  h = hn::IfThenElse(hn::Gt(magnitude, hn::Set(di, 0x7f800000)), nan, h);
  store_low_halves(hn::Or(h, sign), p);
}

#endif
#undef DS_HARDWARE_F16

// Stores 2 * kLanes values: a, then b.
template <class T>
HWY_INLINE void store_pair_as(T tag, V a, V b, typename T::Raw* p) {
  store_as(tag, a, p);
  store_as(tag, b, p + kLanes);
}

#if HWY_TARGET == HWY_AVX2
// The shifts and packs of store_as compete with division and square root for a port, which made the bfloat16 copy the
// dearest part of an update. Here the odd bit comes down through the multiplier, one shuffle a vector picks the bytes,
// and NaNs, which rounding would damage, are only looked for: 0.54 instead of 0.64 ns an element of Adam on Zen 3.
HWY_INLINE void store_pair_as(BF16 tag, V a, V b, uint16_t* p) {
  const auto round = [](V v) HWY_ATTR {
    const __m256i u = _mm256_castps_si256(v.raw);
    const __m256i bit16 = _mm256_set1_epi32(0x10000);
    const __m256i odd = _mm256_madd_epi16(_mm256_and_si256(u, bit16), bit16);  // (u >> 16) & 1
    return _mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd);
  };
  constexpr int64_t kPick = 0x0f0e0b0a07060302;  // the two high bytes of each 32-bit lane; -1 writes zeros
  const __m256i from_a = _mm256_shuffle_epi8(round(a), _mm256_set_epi64x(-1, kPick, -1, kPick));
  const __m256i from_b = _mm256_shuffle_epi8(round(b), _mm256_set_epi64x(kPick, -1, kPick, -1));
  const __m256i packed = _mm256_or_si256(from_a, from_b);  // a0-3 b0-3 a4-7 b4-7
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(packed, 0xd8));
  const V sum = hn::Add(a, b);
  if (HWY_UNLIKELY(_mm256_movemask_ps(_mm256_cmp_ps(sum.raw, sum.raw, _CMP_UNORD_Q)) != 0)) {
    store_as(tag, a, p);
    store_as(tag, b, p + kLanes);
  }
}
#elif HWY_TARGET <= HWY_AVX3 && HWY_ARCH_X86
// The same thought: one permutation of words packs both vectors, one comparison finds a NaN in either.
HWY_INLINE void store_pair_as(BF16 tag, V a, V b, uint16_t* p) {
  const auto round = [](V v) HWY_ATTR {
    const __m512i u = _mm512_castps_si512(v.raw);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    return _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd);
  };
  alignas(64) static constexpr uint16_t kHighWords[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                                                          33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
  _mm512_storeu_si512(p, _mm512_permutex2var_epi16(round(a), _mm512_load_si512(kHighWords), round(b)));
  if (HWY_UNLIKELY(_mm512_cmp_ps_mask(a.raw, b.raw, _CMP_UNORD_Q) != 0)) {
    store_as(tag, a, p);
    store_as(tag, b, p + kLanes);
  }
}
#endif

}  // namespace ds::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
