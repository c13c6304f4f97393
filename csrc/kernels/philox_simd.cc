// SPDX-License-Identifier: Apache-2.0
#include "kernels/simd_targets.h"

#include "kernels/philox.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/philox_simd.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"

#include "kernels/philox_simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace ds::kernels::HWY_NAMESPACE {

void PhiloxFill(uint64_t seed, uint64_t offset, uint64_t first, int64_t n, uint32_t* out) { PhiloxVectors(seed, offset).fill(first, n, out); }

}  // namespace ds::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace ds::kernels {

HWY_EXPORT(PhiloxFill);

void philox_fill(uint64_t seed, uint64_t offset, uint64_t first, int64_t n, uint32_t* out) {
  DS_CHECK_VALUE(n >= 0, "n must not be negative, got " << n);
  DS_CHECK_VALUE(first % 4 == 0, "first must be a multiple of 4, got " << first);
  if (n == 0) return;
  DS_CHECK_VALUE(out != nullptr, "out is null");
  HWY_DYNAMIC_DISPATCH(PhiloxFill)(seed, offset, first, n, out);
}

void philox_fill_ref(uint64_t seed, uint64_t offset, uint64_t first, int64_t n, uint32_t* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = philox_element(seed, offset, first + static_cast<uint64_t>(i));
}

}  // namespace ds::kernels
#endif  // HWY_ONCE
