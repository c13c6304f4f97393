// SPDX-License-Identifier: Apache-2.0
// codes.h in vectors: a block's extent, its codes (one in a uint8 or uint16) and back. Included once per instruction set, after hwy/highway.h.
#if defined(DS_KERNELS_QUANTIZE_CODES_SIMD_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef DS_KERNELS_QUANTIZE_CODES_SIMD_INL_H_
#undef DS_KERNELS_QUANTIZE_CODES_SIMD_INL_H_
#else
#define DS_KERNELS_QUANTIZE_CODES_SIMD_INL_H_
#endif

#include <cstring>

#include "kernels/quantize/codes.h"
#include "kernels/simd_format-inl.h"

HWY_BEFORE_NAMESPACE();
namespace ds::kernels::HWY_NAMESPACE {

using IntTag = hn::RebindToSigned<FloatTag>;
using VI = hn::Vec<IntTag>;

template <int kValue>
HWY_INLINE VI constant() {
  return hn::Set(IntTag(), kValue);
}

// ---- extent --------------------------------------------------------------------------------------------------------

// The largest magnitude (symmetric) or the smallest and largest `ordered` value of what was seen so far.
template <bool kSymmetric>
struct Extent {
  int32_t low = INT32_MAX, high = INT32_MIN;

  HWY_INLINE void see(const float* v, int64_t n) {
    constexpr int kChains = 4;
    VI lows[kChains], highs[kChains];
    for (int k = 0; k < kChains; ++k) {
      lows[k] = hn::Set(IntTag(), low);
      highs[k] = hn::Set(IntTag(), high);
    }
    int64_t i = 0;
    for (; i + kChains * kLanes <= n; i += kChains * kLanes) {
      for (int k = 0; k < kChains; ++k) one(load_as(F32{}, v + i + k * kLanes), lows[k], highs[k]);
    }
    for (; i + kLanes <= n; i += kLanes) one(load_as(F32{}, v + i), lows[0], highs[0]);
    if (i < n) {
      float rest[kLanes];
      for (int64_t k = 0; k < kLanes; ++k) rest[k] = v[n - 1];
      std::memcpy(rest, v + i, static_cast<size_t>(n - i) * sizeof(float));
      one(load_as(F32{}, rest), lows[0], highs[0]);
    }
    high = hn::GetLane(hn::MaxOfLanes(IntTag(), hn::Max(hn::Max(highs[0], highs[1]), hn::Max(highs[2], highs[3]))));
    if (!kSymmetric) low = hn::GetLane(hn::MinOfLanes(IntTag(), hn::Min(hn::Min(lows[0], lows[1]), hn::Min(lows[2], lows[3]))));
  }
  quant::Scale scale(float largest) const {
    return kSymmetric ? quant::scale_of(high, largest) : quant::scale_between(low, high, largest);
  }

 private:
  static HWY_INLINE void one(V v, VI& low, VI& high) {
    const VI bits = hn::BitCast(IntTag(), v);
    const VI magnitude = hn::And(bits, constant<quant::kMagnitude>());
    if (kSymmetric) {
      high = hn::Max(high, magnitude);
    } else {
      const VI ordered = hn::Xor(bits, hn::And(hn::ShiftRight<31>(bits), constant<quant::kMagnitude>()));
      low = hn::Min(low, ordered);
      high = hn::Max(high, ordered);
    }
  }
};

// ---- codes ---------------------------------------------------------------------------------------------------------

template <bool kStochastic>
HWY_INLINE VI round_to_int(V v, const uint32_t* words) {
  const FloatTag df;
  if (!kStochastic) {
    return hn::Sub(hn::BitCast(IntTag(), hn::Add(v, hn::Set(df, quant::kRounder))), constant<quant::kRounderBits>());
  }
  const hn::Rebind<uint32_t, FloatTag> du;
  const V word = hn::ConvertTo(df, hn::BitCast(IntTag(), hn::ShiftRight<8>(hn::LoadU(du, words))));
  const V below = hn::Floor(v);
  const auto up = hn::Lt(hn::Mul(word, hn::Set(df, 0x1p-24f)), hn::Sub(v, below));
  return hn::Sub(hn::ConvertTo(IntTag(), below), hn::BitCast(IntTag(), hn::VecFromMask(df, up)));
}

template <class C, bool kStochastic>
struct Encoder {
  V inverse, zero;
  explicit HWY_INLINE Encoder(const quant::Scale& s) : inverse(hn::Set(FloatTag(), s.inverse)), zero(hn::Set(FloatTag(), s.zero)) {}

  // Integer codes with their sign, floating-point codes as they are.
  HWY_INLINE VI operator()(V x, const uint32_t* words) const {
    const FloatTag df;
    const IntTag di;
    V v = hn::Mul(C::kSymmetric ? x : hn::Sub(x, zero), inverse);
    if constexpr (!C::kFloat) {
      if (kStochastic) v = hn::Min(hn::Max(v, hn::Set(df, C::kSymmetric ? -C::kLargest : 0.0f)), hn::Set(df, C::kLargest));
      return round_to_int<kStochastic>(v, words);
    } else {
      const VI bits = hn::BitCast(di, v);
      V a = hn::BitCast(df, hn::And(bits, constant<quant::kMagnitude>()));
      if (kStochastic) a = hn::Min(a, hn::Set(df, C::kLargest));
      const VI binade = hn::And(hn::BitCast(di, a), constant<quant::kInfBits>());
      const VI exponent = hn::Max(binade, constant<C::kSmallestNormalBits>());
      const V unit = hn::BitCast(df, hn::Sub(constant<static_cast<int>((254u + C::kMantissa) << 23)>(), exponent));
      const VI carried = hn::ShiftRight<23 - C::kMantissa>(hn::Sub(exponent, constant<C::kSmallestNormalBits>()));
      const VI code = hn::Add(round_to_int<kStochastic>(hn::Mul(a, unit), words), carried);
      return hn::Or(code, hn::And(hn::ShiftRight<32 - C::kBits>(bits), constant<C::kSign>()));
    }
  }
};

template <class C>
HWY_INLINE void store_codes(VI codes, uint8_t* p) {
  const hn::Rebind<uint8_t, FloatTag> du8;
  const hn::Rebind<int8_t, FloatTag> di8;
  if constexpr (C::kFloat || !C::kSymmetric) {
    hn::StoreU(hn::DemoteTo(du8, codes), du8, p);
  } else if constexpr (C::kBits == 8) {
    hn::StoreU(hn::BitCast(du8, hn::DemoteTo(di8, codes)), du8, p);
  } else {
    hn::StoreU(hn::DemoteTo(du8, hn::And(codes, constant<(1 << C::kBits) - 1>())), du8, p);
  }
}
template <class C>
HWY_INLINE void store_codes(VI codes, uint16_t* p) {
  const hn::Rebind<uint16_t, FloatTag> du16;
  hn::StoreU(hn::DemoteTo(du16, codes), du16, p);
}

// words: random ones for the n elements, if stochastic.
template <class C, bool kStochastic>
void encode_block(const float* v, int64_t n, const quant::Scale& s, const uint32_t* words, typename C::Code* codes) {
  const Encoder<C, kStochastic> encoder(s);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store_codes<C>(encoder(load_as(F32{}, v + i), words + (kStochastic ? i : 0)), codes + i);
  if (i >= n) return;
  const size_t left = static_cast<size_t>(n - i);
  float rest[kLanes] = {};
  uint32_t rest_words[kLanes] = {};
  typename C::Code rest_codes[kLanes];
  std::memcpy(rest, v + i, left * sizeof(float));
  if (kStochastic) std::memcpy(rest_words, words + i, left * sizeof(uint32_t));
  store_codes<C>(encoder(load_as(F32{}, rest), rest_words), rest_codes);
  std::memcpy(codes + i, rest_codes, left * sizeof(rest_codes[0]));
}

// ---- and back ------------------------------------------------------------------------------------------------------

template <class C>
HWY_INLINE VI load_codes(const uint8_t* p) {
  if constexpr (!C::kFloat && C::kSymmetric && C::kBits == 8) {
    const hn::Rebind<int8_t, FloatTag> di8;
    return hn::PromoteTo(IntTag(), hn::LoadU(di8, reinterpret_cast<const int8_t*>(p)));
  } else {
    const hn::Rebind<uint8_t, FloatTag> du8;
    const VI codes = hn::PromoteTo(IntTag(), hn::LoadU(du8, p));
    if constexpr (C::kFloat || !C::kSymmetric) return codes;
    else return hn::ShiftRight<32 - C::kBits>(hn::ShiftLeft<32 - C::kBits>(codes));
  }
}
template <class C>
HWY_INLINE VI load_codes(const uint16_t* p) {
  const hn::Rebind<uint16_t, FloatTag> du16;
  return hn::PromoteTo(IntTag(), hn::LoadU(du16, p));
}

// Every floating-point format fits into a half once its bits are moved up: the machine's own conversion of halves then knows exponents and
// subnormals, and the difference of the biases is a power of two. Elsewhere it is spelled out.
#if HWY_TARGET <= HWY_AVX2 && HWY_ARCH_X86 && !defined(HWY_DISABLE_F16C)
#define DS_QUANT_BY_HALVES 1
#else
#define DS_QUANT_BY_HALVES 0
#endif

// The float values of kLanes codes.
template <class C>
HWY_INLINE V float_values(const typename C::Code* p) {
  const FloatTag df;
#if DS_QUANT_BY_HALVES
  const hn::Rebind<uint16_t, FloatTag> du16;
  const hn::Rebind<typename C::Code, FloatTag> dcode;
  hn::Vec<decltype(du16)> code;
  if constexpr (C::kBits > 8) code = hn::LoadU(du16, p);
  else code = hn::PromoteTo(du16, hn::LoadU(dcode, p));
  auto bits = hn::ShiftLeft<16 - C::kBits>(code);  // the sign is in place; exponent and mantissa move down behind the half's wider exponent
  if constexpr (C::kExponent != 5) {
    const auto sign = hn::And(bits, hn::Set(du16, uint16_t{0x8000}));
    const auto magnitude = hn::And(code, hn::Set(du16, static_cast<uint16_t>(C::kSign - 1)));
    bits = hn::Or(sign, hn::ShiftLeft<10 - C::kMantissa>(magnitude));
    if constexpr (C::kSpecial != 0) {
      const auto special = hn::Eq(magnitude, hn::Set(du16, static_cast<uint16_t>(C::kSpecial)));
      bits = hn::IfThenElse(special, hn::Set(du16, uint16_t{0x7e00}), bits);
    }
  }
  const V value = hn::PromoteTo(df, hn::BitCast(hn::Rebind<hwy::float16_t, FloatTag>(), bits));
  return C::kExponent == 5 ? value : hn::Mul(value, hn::Set(df, static_cast<float>(1 << (15 - C::kBias))));
#else
  const VI code = load_codes<C>(p);
  const VI magnitude = hn::And(code, constant<C::kSign - 1>());
  const VI shifted = hn::ShiftLeft<23 - C::kMantissa>(magnitude);
  const V next = hn::BitCast(df, hn::Add(shifted, constant<C::kSmallestNormalBits>()));
  const V subnormal = hn::Sub(next, hn::BitCast(df, constant<C::kSmallestNormalBits>()));
  const V normal = hn::BitCast(df, hn::Add(shifted, constant<C::kSmallestNormalBits - (1 << 23)>()));
  V a = hn::IfThenElse(hn::RebindMask(df, hn::Lt(magnitude, constant<(1 << C::kMantissa)>())), subnormal, normal);
  if constexpr (C::kSpecial != 0) {
    const V special = hn::BitCast(df, hn::Or(shifted, constant<quant::kInfBits>()));
    a = hn::IfThenElse(hn::RebindMask(df, hn::Gt(magnitude, constant<C::kSpecial - 1>())), special, a);
  }
  const VI sign = hn::ShiftLeft<32 - C::kBits>(hn::And(code, constant<C::kSign>()));
  return hn::BitCast(df, hn::Or(hn::BitCast(IntTag(), a), sign));
#endif
}

template <class C>
HWY_INLINE V decode_codes(const typename C::Code* p, V scale, V zero) {
  if constexpr (C::kFloat) {
    return hn::Mul(scale, float_values<C>(p));
  } else {
    const V product = hn::Mul(scale, hn::ConvertTo(FloatTag(), load_codes<C>(p)));
    return C::kSymmetric ? product : hn::Add(zero, product);
  }
}

// out = or, with kAdd, += the values of n codes.
template <class C, bool kAdd>
void decode_block(const typename C::Code* codes, int64_t n, float scale_value, float zero_value, float* out) {
  const V scale = hn::Set(FloatTag(), scale_value), zero = hn::Set(FloatTag(), zero_value);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const V x = decode_codes<C>(codes + i, scale, zero);
    store_as(F32{}, kAdd ? hn::Add(load_as(F32{}, out + i), x) : x, out + i);
  }
  if (i >= n) return;
  const size_t left = static_cast<size_t>(n - i);
  typename C::Code rest_codes[kLanes] = {};
  float rest[kLanes] = {};
  std::memcpy(rest_codes, codes + i, left * sizeof(rest_codes[0]));
  if (kAdd) std::memcpy(rest, out + i, left * sizeof(float));
  const V x = decode_codes<C>(rest_codes, scale, zero);
  store_as(F32{}, kAdd ? hn::Add(load_as(F32{}, rest), x) : x, rest);
  std::memcpy(out + i, rest, left * sizeof(float));
}

#undef DS_QUANT_BY_HALVES

}  // namespace ds::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
