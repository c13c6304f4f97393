// SPDX-License-Identifier: Apache-2.0
#include "plan/resting.h"

#include <cmath>

#include "base/checked.h"
#include "base/error.h"

namespace ds::plan {

std::vector<bool> resting_units(const std::vector<int64_t>& trained, double share) {
  DS_CHECK_VALUE(share >= 0 && share <= 1, "a share of " << share << "; it must lie in [0, 1]");
  int64_t total = 0;
  for (const int64_t numel : trained) total = checked_add(total, numel);
  std::vector<bool> rests(trained.size(), true);
  int64_t left = std::llround((1 - share) * static_cast<double>(total));   // of what is to stay
  for (size_t i = 0; i < trained.size(); ++i) {
    if (trained[i] <= left) {
      rests[i] = false;
      left -= trained[i];
    }
  }
  const size_t none = trained.size();
  size_t smallest = none;   // of those that do not fit any more
  for (size_t i = 0; i < trained.size(); ++i) {
    if (rests[i] && (smallest == none || trained[i] < trained[smallest])) smallest = i;
  }
  if (smallest != none && trained[smallest] - left < left) rests[smallest] = false;
  return rests;
}

}  // namespace ds::plan
