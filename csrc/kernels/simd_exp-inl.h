// SPDX-License-Identifier: Apache-2.0
// exp of float32 vectors. Included once per instruction set, after hwy/highway.h.
#if defined(DS_KERNELS_SIMD_EXP_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef DS_KERNELS_SIMD_EXP_INL_H_
#undef DS_KERNELS_SIMD_EXP_INL_H_
#else
#define DS_KERNELS_SIMD_EXP_INL_H_
#endif

#include "kernels/simd_format-inl.h"

HWY_BEFORE_NAMESPACE();
namespace ds::kernels::HWY_NAMESPACE {

// e^x for x <= 0 (and a rounding above): 0 below -86.9, where results would soon be subnormal; NaN stays NaN.
// kExact: within 1.5 ulp of float32; otherwise within 6e-6 of the value, 40 times finer than half precision rounds.
// x = n ln 2 + r with |r| <= ln 2 / 2; e^r by a polynomial whose first two coefficients are 1 (minimax of the rest).
template <bool kExact>
HWY_INLINE V exp_nonpositive(V x) {
  const FloatTag df;
  const hn::Rebind<int32_t, FloatTag> di;
  const V shift = hn::Set(df, 12582912.0f);  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  const V shifted = hn::MulAdd(x, hn::Set(df, 1.44269504088896341f), shift);
  const V n = hn::Sub(shifted, shift);
  V r = hn::NegMulAdd(n, hn::Set(df, 0.693145751953125f), x);
  r = hn::NegMulAdd(n, hn::Set(df, 1.428606765330187e-6f), r);
  V p;
  if (kExact) {
    p = hn::MulAdd(r, hn::Set(df, 0.00138145394f), hn::Set(df, 0.00836874545f));
    p = hn::MulAdd(r, p, hn::Set(df, 0.041668389f));
    p = hn::MulAdd(r, p, hn::Set(df, 0.166665211f));
    p = hn::MulAdd(r, p, hn::Set(df, 0.49999994f));
  } else {
    p = hn::MulAdd(r, hn::Set(df, 0.0412773676f), hn::Set(df, 0.167536005f));
    p = hn::MulAdd(r, p, hn::Set(df, 0.50005126f));
  }
  p = hn::MulAdd(hn::Mul(r, r), p, r);
  const V power = hn::BitCast(df, hn::Add(hn::ShiftLeft<23>(hn::BitCast(di, shifted)), hn::Set(di, 0x3f800000)));  // 2^n
  return hn::IfThenZeroElse(hn::Lt(x, hn::Set(df, -86.9f)), hn::MulAdd(p, power, power));
}

}  // namespace ds::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
