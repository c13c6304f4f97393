// SPDX-License-Identifier: Apache-2.0
#include "kernels/simd_targets.h"

#include "kernels/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/targets_simd.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"

// Chosen the way the kernels are: one function for each instruction set, dispatched at run time.
HWY_BEFORE_NAMESPACE();
namespace ds::kernels::HWY_NAMESPACE {
int64_t ThisTarget() { return HWY_TARGET; }
}  // namespace ds::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace ds::kernels {

HWY_EXPORT(ThisTarget);

std::vector<std::string> compiled_targets() {
  std::vector<std::string> names;
  for (int bit = 0; bit < 63; ++bit) {  // a better target has a lower bit
    const int64_t target = int64_t{1} << bit;
    if ((HWY_TARGETS & target) != 0) names.emplace_back(hwy::TargetName(target));
  }
  return names;
}

std::string chosen_target() { return hwy::TargetName(HWY_DYNAMIC_DISPATCH(ThisTarget)()); }

}  // namespace ds::kernels
#endif  // HWY_ONCE
