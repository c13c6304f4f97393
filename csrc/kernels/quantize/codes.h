// SPDX-License-Identifier: Apache-2.0
// One block's scale and one element's code (quantize.h, Notes [codes] and [scales]), in float32 with one rounding an operation. Used by the
// scalar reference and the CUDA kernels; the SIMD kernels spell the same operations in vectors.
#pragma once

#include <cmath>
#include <cstring>

#include "kernels/quantize/quantize.h"

#ifdef __CUDACC__
#define DS_QUANT_FN __host__ __device__ __forceinline__
#else
#define DS_QUANT_FN inline
#endif

namespace ds::kernels::quant {

// On the device a plain a * b + c would become one fused operation; these keep the bits of the CPU.
#ifdef __CUDA_ARCH__
DS_QUANT_FN float mul(float a, float b) { return __fmul_rn(a, b); }
DS_QUANT_FN float add(float a, float b) { return __fadd_rn(a, b); }
DS_QUANT_FN float div(float a, float b) { return __fdiv_rn(a, b); }
DS_QUANT_FN int32_t bits_of(float x) { return __float_as_int(x); }
DS_QUANT_FN float of_bits(int32_t x) { return __int_as_float(x); }
#else
DS_QUANT_FN float mul(float a, float b) { return a * b; }
DS_QUANT_FN float add(float a, float b) { return a + b; }
DS_QUANT_FN float div(float a, float b) { return a / b; }
DS_QUANT_FN int32_t bits_of(float x) {
  int32_t i;
  std::memcpy(&i, &x, sizeof(i));
  return i;
}
DS_QUANT_FN float of_bits(int32_t i) {
  float x;
  std::memcpy(&x, &i, sizeof(x));
  return x;
}
#endif

constexpr float kSmallestScale = 0x1p-126f;
constexpr int32_t kInfBits = 0x7f800000;
constexpr int32_t kNanBits = 0x7fc00000;
constexpr int32_t kMagnitude = 0x7fffffff;

// Adding it to |v| < 2^22 leaves v, rounded to an integer (ties to even), in the low bits of the sum.
constexpr float kRounder = 0x1.8p23f;
constexpr int32_t kRounderBits = 0x4b400000;

// Signed integers in the order of floats, -0 below +0, NaNs outside the infinities; its own inverse.
DS_QUANT_FN int32_t ordered(int32_t bits) { return bits ^ ((bits >> 31) & kMagnitude); }

template <int kBits_, bool kSymmetric_>
struct IntCodes {
  static constexpr bool kFloat = false, kSymmetric = kSymmetric_;
  static constexpr int kBits = kBits_;
  static constexpr float kLargest = (1 << (kSymmetric ? kBits - 1 : kBits)) - 1;
  using Code = uint8_t;
};

// kSpecial: the magnitude from which codes are infinities and NaNs; 0 if there are none.
template <int kExponent_, int kMantissa_, int kSpecial_>
struct FloatCodes {
  static constexpr bool kFloat = true, kSymmetric = true;
  static constexpr int kExponent = kExponent_, kMantissa = kMantissa_, kSpecial = kSpecial_;
  static constexpr int kBits = 1 + kExponent + kMantissa, kBias = (1 << (kExponent - 1)) - 1;
  static constexpr int kLargestCode = (kSpecial != 0 ? kSpecial : 1 << (kExponent + kMantissa)) - 1;
  static constexpr int kLargestExponent = (kLargestCode >> kMantissa) - kBias;
  static constexpr float kLargest =
      static_cast<float>(((kLargestCode & ((1 << kMantissa) - 1)) | (1 << kMantissa)) << kLargestExponent) / (1 << kMantissa);
  static constexpr int32_t kSmallestNormalBits = (128 - kBias) << 23;  // 2^(1 - bias)
  static constexpr int32_t kSign = 1 << (kBits - 1);
  using Code = std::conditional_t<(kBits > 8), uint16_t, uint8_t>;
};

// Calls f with the codes of a format.
template <typename F>
void dispatch_codes(QuantFormat format, bool symmetric, F&& f) {
  DS_CHECK_VALUE(symmetric || format == QuantFormat::INT8 || format == QuantFormat::INT4,
                 "symmetric: only integer formats can be asymmetric");
  switch (format) {
    case QuantFormat::INT8: return symmetric ? f(IntCodes<8, true>{}) : f(IntCodes<8, false>{});
    case QuantFormat::INT4: return symmetric ? f(IntCodes<4, true>{}) : f(IntCodes<4, false>{});
    case QuantFormat::FP8_E4M3: return f(FloatCodes<4, 3, 0x7f>{});
    case QuantFormat::FP8_E5M2: return f(FloatCodes<5, 2, 0x7c>{});
    case QuantFormat::FP6_E3M2: return f(FloatCodes<3, 2, 0>{});
    case QuantFormat::FP4_E2M1: return f(FloatCodes<2, 1, 0>{});
    case QuantFormat::FP12_E4M7: return f(FloatCodes<4, 7, 0>{});
  }
  DS_FAIL_VALUE("format: not a QuantFormat: " << static_cast<int>(format));
}

struct Scale {
  float scale, inverse, zero;
  bool finite;
};

// zero + code * scale for an extent of these bits, NaN above infinity above numbers. The quotient may have been rounded up, near the largest float by
// so much that the largest code would read as an infinity: two steps lower it cannot, as the product loses more than what both roundings gained.
DS_QUANT_FN Scale scale_for(int32_t extent, float largest, float zero) {
  if (extent >= kInfBits) return {of_bits(kNanBits), 0.0f, of_bits(kNanBits), false};
  const float s = div(of_bits(extent), largest);
  float scale = s < kSmallestScale ? kSmallestScale : s;
  if ((bits_of(add(zero, mul(scale, largest))) & kMagnitude) >= kInfBits) scale = of_bits(bits_of(scale) - 2);
  return {scale, div(1.0f, scale), zero, true};
}
// Of a block whose largest magnitude has these bits.
DS_QUANT_FN Scale scale_of(int32_t magnitude, float largest) {
  Scale s = scale_for(magnitude, largest, 0.0f);
  s.zero = 0.0f;
  return s;
}
// Of a block whose smallest and largest `ordered` values are these.
DS_QUANT_FN Scale scale_between(int32_t low, int32_t high, float largest) {
  const float zero = of_bits(ordered(low));
  const float extent = add(of_bits(ordered(high)), -zero);
  return scale_for(bits_of(extent) & kMagnitude, largest, zero);
}

// v >= 0 or, for symmetric integers, any: to an integer.
template <bool kStochastic>
DS_QUANT_FN int32_t round_to_int(float v, uint32_t word) {
  if (!kStochastic) return bits_of(add(v, kRounder)) - kRounderBits;
  const float below = floorf(v);
  const float fraction = add(v, -below);  // exact
  return static_cast<int32_t>(below) + (mul(static_cast<float>(word >> 8), 0x1p-24f) < fraction ? 1 : 0);
}

// The code of x: see Note [scales]. Nearest needs no clamp: x * inverse exceeds the largest code by a few roundings at most.
template <class C, bool kStochastic>
DS_QUANT_FN uint32_t encode(float x, const Scale& s, uint32_t word) {
  float v = mul(C::kSymmetric ? x : add(x, -s.zero), s.inverse);
  if constexpr (!C::kFloat) {
    if (kStochastic) v = fminf(fmaxf(v, C::kSymmetric ? -C::kLargest : 0.0f), C::kLargest);
    return static_cast<uint32_t>(round_to_int<kStochastic>(v, word)) & ((1u << C::kBits) - 1u);
  } else {
    float a = of_bits(bits_of(v) & kMagnitude);
    if (kStochastic) a = fminf(a, C::kLargest);
    const int32_t binade = bits_of(a) & kInfBits;  // the power of two below a, at least that of the smallest normal code
    const int32_t exponent = binade < C::kSmallestNormalBits ? C::kSmallestNormalBits : binade;
    // a in units of the last place there: an integer below 2^(kMantissa + 1), carries move on to the next binade.
    const float unit = of_bits(((127 + C::kMantissa) << 23) - (exponent - (127 << 23)));
    const int32_t code = round_to_int<kStochastic>(mul(a, unit), word) + ((exponent - C::kSmallestNormalBits) >> (23 - C::kMantissa));
    return static_cast<uint32_t>(code | (bits_of(v) < 0 ? C::kSign : 0));
  }
}

template <class C>
DS_QUANT_FN float decode(uint32_t code, float scale, float zero) {
  if constexpr (!C::kFloat) {
    constexpr int kUnused = 32 - C::kBits;
    const int32_t integer = C::kSymmetric ? static_cast<int32_t>(code << kUnused) >> kUnused : static_cast<int32_t>(code);
    const float product = mul(scale, static_cast<float>(integer));
    return C::kSymmetric ? product : add(zero, product);
  } else {
    const int32_t magnitude = static_cast<int32_t>(code) & (C::kSign - 1);
    const int32_t shifted = magnitude << (23 - C::kMantissa);
    float a = of_bits(shifted + C::kSmallestNormalBits - (1 << 23));
    if (magnitude < (1 << C::kMantissa)) a = add(of_bits(shifted + C::kSmallestNormalBits), -of_bits(C::kSmallestNormalBits));
    if (C::kSpecial != 0 && magnitude >= C::kSpecial) a = of_bits(shifted | kInfBits);
    return mul(scale, (code & C::kSign) != 0 ? -a : a);
  }
}

}  // namespace ds::kernels::quant
