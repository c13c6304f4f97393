// SPDX-License-Identifier: Apache-2.0
// Stores past the caches, see output.h. Included once per instruction set, after hwy/highway.h.
#if defined(DS_KERNELS_SIMD_STREAM_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef DS_KERNELS_SIMD_STREAM_INL_H_
#undef DS_KERNELS_SIMD_STREAM_INL_H_
#else
#define DS_KERNELS_SIMD_STREAM_INL_H_
#endif

#include "hwy/cache_control.h"

#include "kernels/output.h"
#include "kernels/simd_format-inl.h"

HWY_BEFORE_NAMESPACE();
namespace ds::kernels::HWY_NAMESPACE {

// store_pair_as past the caches; p is streamable. (float16 is written as ever.)
template <class T>
HWY_INLINE void stream_pair_as(T tag, V a, V b, typename T::Raw* p) {
  store_pair_as(tag, a, b, p);
}
HWY_INLINE void stream_pair_as(F32, V a, V b, float* p) {
  hn::Stream(a, FloatTag(), p);
  hn::Stream(b, FloatTag(), p + kLanes);
}
#if HWY_TARGET != HWY_SCALAR
HWY_INLINE void stream_pair_as(BF16 tag, V a, V b, uint16_t* p) {
  const hn::ScalableTag<uint16_t> d;  // as long as the pair
  alignas(kStreamBytes) uint16_t pair[2 * kLanes];
  store_pair_as(tag, a, b, pair);
  hn::Stream(hn::Load(d, pair), d, p);
}
#endif

}  // namespace ds::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
