// SPDX-License-Identifier: Apache-2.0
// The 16 double lanes of reduce.h, Note [statistics], in vectors. Included once per instruction set.
#if defined(DS_KERNELS_REDUCE_SQUARES_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef DS_KERNELS_REDUCE_SQUARES_INL_H_
#undef DS_KERNELS_REDUCE_SQUARES_INL_H_
#else
#define DS_KERNELS_REDUCE_SQUARES_INL_H_
#endif

#include "kernels/reduce/statistics.h"
#include "kernels/simd_format-inl.h"

HWY_BEFORE_NAMESPACE();
namespace ds::kernels::HWY_NAMESPACE {

using DoubleTag = hn::ScalableTag<double>;
using W = hn::Vec<DoubleTag>;
constexpr int kDoubleLanes = static_cast<int>(hn::MaxLanes(DoubleTag()));

struct Squares {
  W lanes[kStatLanes / kDoubleLanes];

  HWY_INLINE Squares() {
    for (W& lane : lanes) lane = hn::Zero(DoubleTag());
  }
  // v holds elements [u * kLanes, (u + 1) * kLanes) of a group of kStatLanes. A square of a float is exact in double,
  // so it does not matter whether the product and the sum are fused.
  HWY_INLINE void add(int u, V v) {
    const DoubleTag dd;
#if HWY_TARGET == HWY_SCALAR
    const W x = hn::PromoteTo(dd, v);
    lanes[u] = hn::MulAdd(x, x, lanes[u]);
#else
    const hn::Half<FloatTag> half;
    const W low = hn::PromoteTo(dd, hn::LowerHalf(half, v));
    const W high = hn::PromoteTo(dd, hn::UpperHalf(half, v));
    lanes[2 * u] = hn::MulAdd(low, low, lanes[2 * u]);
    lanes[2 * u + 1] = hn::MulAdd(high, high, lanes[2 * u + 1]);
#endif
  }
  HWY_INLINE void store(double* out) const {
    for (int j = 0; j < kStatLanes / kDoubleLanes; ++j) hn::StoreU(lanes[j], DoubleTag(), out + j * kDoubleLanes);
  }
};

}  // namespace ds::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
