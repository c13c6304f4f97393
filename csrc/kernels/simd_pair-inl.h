// SPDX-License-Identifier: Apache-2.0
// Two float32 vectors at a time, from and to the storage formats of dispatch.h: whole, or the last `count` elements of an array by way of a
// copy, so that tails run the code that whole pairs run and an element's bits do not depend on its place.
// Included once per instruction set, after hwy/highway.h.
#if defined(DS_KERNELS_SIMD_PAIR_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef DS_KERNELS_SIMD_PAIR_INL_H_
#undef DS_KERNELS_SIMD_PAIR_INL_H_
#else
#define DS_KERNELS_SIMD_PAIR_INL_H_
#endif

#include <cstring>

#include "kernels/simd_stream-inl.h"

HWY_BEFORE_NAMESPACE();
namespace ds::kernels::HWY_NAMESPACE {

constexpr int64_t kPairLanes = 2 * kLanes;

struct Pair {
  V a, b;
};

// Elements [i, i + kPairLanes), or the first `count` of them when not kWhole; the others are zero.
template <bool kWhole, class T>
HWY_INLINE Pair get_pair(T tag, const typename T::Raw* p, int64_t count) {
  if (kWhole) return {load_as(tag, p), load_as(tag, p + kLanes)};
  typename T::Raw copy[kPairLanes] = {};
  std::memcpy(copy, p, static_cast<size_t>(count) * sizeof(copy[0]));
  return {load_as(tag, copy), load_as(tag, copy + kLanes)};
}

// past_caches: see output.h; p is streamable then.
template <bool kWhole, class T>
HWY_INLINE void put_pair(T tag, const Pair& v, typename T::Raw* p, int64_t count, bool past_caches = false) {
  if (kWhole) return past_caches ? stream_pair_as(tag, v.a, v.b, p) : store_pair_as(tag, v.a, v.b, p);
  typename T::Raw copy[kPairLanes];
  store_pair_as(tag, v.a, v.b, copy);
  std::memcpy(p, copy, static_cast<size_t>(count) * sizeof(copy[0]));
}

// body.pair<kWhole>(i, count) for the n elements of a row.
template <class Body>
HWY_INLINE void for_pairs(const Body& body, int64_t n) {
  int64_t i = 0;
  for (; i + kPairLanes <= n; i += kPairLanes) body.template pair<true>(i, kPairLanes);
  if (i < n) body.template pair<false>(i, n - i);
}

}  // namespace ds::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
