// SPDX-License-Identifier: Apache-2.0
// exp, the logistic function and the normal distribution in float32 vectors, each in two precisions: Fine for results kept in float32
// (a few units in the last place), Coarse for results rounded to bfloat16 or float16 afterwards (relative 2^-15, for bfloat16 2^-13: a sixteenth
// of the format's rounding). What the activations made of them err is measured over the whole range against fp64 by tests/cpp/kernels/activation_test.cpp.
//
// Method. exp: x = n ln 2 + r with the two-part ln 2 of Cody and Waite, a minimax polynomial in r, n added to the exponent bits.
// The normal tail P(X > a) = exp(-a^2 / 2) M(a): the factor M (Mills' ratio over sqrt(2 pi)) is smooth, so with t = 1 / (1 + c a), as in
// Hastings' approximations of erf (Abramowitz and Stegun 7.1.26), it is t times a short polynomial in t. That keeps the relative precision of
// negative arguments, where 1 + erf cancels, and the backward pass has the density for nothing. The polynomials are minimax fits of the
// relative error made for these files (Lawson's reweighting on Chebyshev nodes, 40 digits): exp on |r| <= ln(2)/2 errs 3.1e-9 and 5.3e-6,
// M on [0, 13.5] 2.3e-8 and 7.5e-6.
// Included once per instruction set, after hwy/highway.h.
#if defined(DS_KERNELS_SIMD_MATH_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef DS_KERNELS_SIMD_MATH_INL_H_
#undef DS_KERNELS_SIMD_MATH_INL_H_
#else
#define DS_KERNELS_SIMD_MATH_INL_H_
#endif

#include <type_traits>

#include "kernels/simd_format-inl.h"

HWY_BEFORE_NAMESPACE();
namespace ds::kernels::HWY_NAMESPACE {

HWY_INLINE V constant(float x) { return hn::Set(FloatTag(), x); }

// c[0] + c[1] x + ... + c[N - 1] x^(N - 1).
template <int N>
HWY_INLINE V polynomial(const float (&c)[N], V x) {
  V sum = constant(c[N - 1]);
  for (int k = N - 2; k >= 0; --k) sum = hn::MulAdd(sum, x, constant(c[k]));
  return sum;
}

struct Fine {
  static constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  static constexpr float kExp[] = {0.49999993447779073f, 0.16666520631627404f, 0.04166838804884497f, 0.008368716887328294f,
                                   0.0013814598474067253f};
  static constexpr float kTailScale = 0.27f;
  static constexpr float kTail[] = {0.1077195405960083f,   0.10756074637174606f, 0.10169055312871933f,
                                    0.07249332219362259f,  0.10683628916740417f, -0.06784452497959137f,
                                    0.1686420738697052f,   -0.12595342099666595f, 0.028855426236987114f};
  // 1 / x for x in [1, 2^126].
  static HWY_INLINE V reciprocal(V x) {
#if HWY_TARGET <= HWY_AVX3 && HWY_ARCH_X86  // 14 bits to begin with, 28 after one of Newton's steps: cheaper than a division
    const V guess = hn::ApproximateReciprocal(x);
    return hn::MulAdd(guess, hn::NegMulAdd(x, guess, constant(1.0f)), guess);
#else
    return hn::Div(constant(1.0f), x);
#endif
  }
  // 1 / (1 + e) for e in [0, 1]; what rounding 1 + e loses is made good.
  static HWY_INLINE V reciprocal_of_one_plus(V e) {
    const V one = constant(1.0f), sum = hn::Add(one, e);
    const V lost = hn::Sub(e, hn::Sub(sum, one));
#if HWY_TARGET <= HWY_AVX3 && HWY_ARCH_X86
    const V guess = hn::ApproximateReciprocal(sum);
#else
    const V guess = hn::Div(one, sum);
#endif
    return hn::MulAdd(guess, hn::NegMulAdd(lost, guess, hn::NegMulAdd(sum, guess, one)), guess);
  }
};

template <bool kRefine>
struct CoarseOf {
  static constexpr float kLn2High = 0.693147181f, kLn2Low = 0.0f;
  static constexpr float kExp[] = {0.5000511805251334f, 0.16753531273370084f, 0.04127767130198766f};
  static constexpr float kTailScale = 0.3f;
  static constexpr float kTail[] = {0.1200922355055809f,    0.11355042457580566f, 0.14495497941970825f,
                                    -0.018355390056967735f, 0.21726857125759125f, -0.07750705629587173f};
  static HWY_INLINE V reciprocal(V x) {
#if HWY_ARCH_X86 && HWY_TARGET != HWY_SCALAR  // 11 bits (AVX-512: 14), twice as many after a step
    const V guess = hn::ApproximateReciprocal(x);
    if (!kRefine && HWY_TARGET <= HWY_AVX3) return guess;
    return hn::MulAdd(guess, hn::NegMulAdd(x, guess, constant(1.0f)), guess);
#else
    return hn::Div(constant(1.0f), x);
#endif
  }
  static HWY_INLINE V reciprocal_of_one_plus(V e) { return reciprocal(hn::Add(constant(1.0f), e)); }
};

// The precision that a storage format asks for.
template <class T>
struct Precision {
  using Type = CoarseOf<std::is_same<T, F16>::value>;
};
template <>
struct Precision<F32> {
  using Type = Fine;
};

// exp(x) for x in [-87, 88], relative error 2^-23 (Fine) or 2^-16 (Coarse).
template <class P>
HWY_INLINE V exp_bounded(V x) {
  const hn::Rebind<uint32_t, FloatTag> du32;
  const V shifter = constant(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer and leaves that in the low bits
  const V shifted = hn::MulAdd(x, constant(1.44269504088896341f), shifter);
  const V n = hn::Sub(shifted, shifter);
  const V r = P::kLn2Low == 0.0f ? hn::NegMulAdd(n, constant(P::kLn2High), x)
                                 : hn::NegMulAdd(n, constant(P::kLn2Low), hn::NegMulAdd(n, constant(P::kLn2High), x));
  const V one_plus = hn::MulAdd(hn::MulAdd(polynomial(P::kExp, r), r, constant(1.0f)), r, constant(1.0f));
  return hn::BitCast(FloatTag(), hn::Add(hn::BitCast(du32, one_plus), hn::ShiftLeft<23>(hn::BitCast(du32, shifted))));
}

// s = 1 / (1 + exp(-x)) and rest = 1 - s, both with full relative precision; the smaller one is 0 from |x| = 87 on. For NaN some number.
struct Logistic {
  V s, rest;
};
template <class P>
HWY_INLINE Logistic logistic(V x) {
  const V magnitude = hn::Abs(x);
  const V e = hn::IfThenElseZero(hn::Lt(magnitude, constant(87.0f)), exp_bounded<P>(hn::Neg(hn::Min(magnitude, constant(87.0f)))));
  const V large = P::reciprocal_of_one_plus(e), small = hn::Mul(e, large);
  const auto negative = hn::Lt(x, hn::Zero(FloatTag()));
  return {hn::IfThenElse(negative, small, large), hn::IfThenElse(negative, large, small)};
}

// 1 / (1 + exp(-x)) alone, where that is enough.
template <class P>
HWY_INLINE V logistic_value(V x) {
  const V most = constant(87.0f);
  const V e = exp_bounded<P>(hn::Min(hn::Max(hn::Neg(x), hn::Neg(most)), most));
  return hn::IfThenZeroElse(hn::Lt(x, hn::Neg(most)), P::reciprocal(hn::Add(constant(1.0f), e)));
}

// cdf = P(X <= x) of the standard normal distribution, bell = exp(-x^2 / 2), 0 from |x| = 13 on; for NaN 1 and 0.
struct Normal {
  V cdf, bell;
};
template <class P>
HWY_INLINE Normal normal(V x) {
  const V magnitude = hn::Abs(x);
  const V a = hn::Min(magnitude, constant(13.0f));
  const V t = P::reciprocal(hn::MulAdd(a, constant(P::kTailScale), constant(1.0f)));
  const V e = exp_bounded<P>(hn::Mul(hn::Mul(a, constant(-0.5f)), a));
  const V bell = hn::IfThenElseZero(hn::Lt(magnitude, constant(13.0f)), e);
  const V tail = hn::Mul(hn::Mul(polynomial(P::kTail, t), t), bell);
  return {hn::IfThenElse(hn::Lt(x, constant(0.0f)), tail, hn::Sub(constant(1.0f), tail)), bell};
}

}  // namespace ds::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
