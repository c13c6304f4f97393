// SPDX-License-Identifier: Apache-2.0
// The activations on the device, in the forms and precisions of simd_math-inl.h: float32 storage gets the accurate functions of CUDA, the 16-bit
// formats the fast ones, which are cheap enough to hide behind memory.
#pragma once

#include "kernels/activation/activation.h"
#include "kernels/launch.cuh"

namespace ds::kernels::cuda {

struct ValueAndSlope {
  float value, slope;
};

template <bool kFast>
__device__ __forceinline__ float exponential(float x) {
  return kFast ? __expf(x) : expf(x);
}
template <bool kFast>
__device__ __forceinline__ float divide(float a, float b) {
  return kFast ? __fdividef(a, b) : a / b;
}

struct Logistic {
  float s, rest;
};
template <bool kFast>
__device__ __forceinline__ Logistic logistic(float x) {
  const float e = exponential<kFast>(-fabsf(x));
  const float large = divide<kFast>(1.0f, 1.0f + e), small = e * large;
  return x < 0.0f ? Logistic{small, large} : Logistic{large, small};
}

// P(X <= x) and exp(-x^2 / 2); the polynomial is simd_math-inl.h's CoarseOf::kTail.
template <bool kFast>
__device__ __forceinline__ void normal(float x, float& cdf, float& bell) {
  bell = exponential<kFast>(-0.5f * x * x);
  if (!kFast) {
    cdf = normcdff(x);
    return;
  }
  const float t = __fdividef(1.0f, fmaf(fminf(fabsf(x), 13.5f), 0.3f, 1.0f));
  float p = fmaf(-0.07750705629587173f, t, 0.21726857125759125f);
  p = fmaf(p, t, -0.018355390056967735f);
  p = fmaf(p, t, 0.14495497941970825f);
  p = fmaf(p, t, 0.11355042457580566f);
  p = fmaf(p, t, 0.1200922355055809f);
  const float tail = p * t * bell;
  cdf = x < 0.0f ? tail : 1.0f - tail;
}

template <Activation kAct, bool kFast>
__device__ __forceinline__ ValueAndSlope activate(float x) {
  if (kAct == Activation::Relu) return {x < 0.0f ? 0.0f : x, x <= 0.0f ? 0.0f : 1.0f};
  if (kAct == Activation::GeluErf) {
    float cdf, bell;
    normal<kFast>(x, cdf, bell);
    return {x * cdf, fmaf(x * 0.398942280401432678f, bell, cdf)};
  }
  if (kAct == Activation::Silu) {
    const Logistic l = logistic<kFast>(x);
    return {x * l.s, fmaf(x * l.s, l.rest, l.s)};
  }
  constexpr float kLinear = 1.59576912160573071f, kCubic = 0.0713548162726009f;  // 2 sqrt(2 / pi), times 0.044715
  const float square = fminf(x * x, 1e4f);
  const Logistic l = logistic<kFast>(x * fmaf(square, kCubic, kLinear));
  return {x * l.s, fmaf(x * l.s, l.rest * fmaf(square, 3.0f * kCubic, kLinear), l.s)};
}

// The 16-bit formats.
template <class T>
constexpr bool kFastFor = sizeof(typename T::Raw) == 2;

// f(storage format, the activation as a constant).
template <class F>
void with_activation(Activation act, DType dtype, const char* name, const F& f) {
  dispatch_float(dtype, name, [&](auto tag) {
    switch (act) {
      case Activation::GeluErf: return f(tag, std::integral_constant<Activation, Activation::GeluErf>());
      case Activation::GeluTanh: return f(tag, std::integral_constant<Activation, Activation::GeluTanh>());
      case Activation::Silu: return f(tag, std::integral_constant<Activation, Activation::Silu>());
      case Activation::Relu: return f(tag, std::integral_constant<Activation, Activation::Relu>());
    }
    DS_FAIL_VALUE("act: not an activation: " << static_cast<int>(act));
  });
}

}  // namespace ds::kernels::cuda
