// SPDX-License-Identifier: Apache-2.0
// The 16 double lanes of reduce.h, Note [statistics], and how they become stats.
#pragma once

#include <cmath>
#include <cstdint>

namespace ds::kernels {

constexpr int kStatLanes = 16;

// Adds the lanes pairwise: 8, 4, 2, 1 apart. Destroys them.
inline double add_lanes(double* lanes) {
  for (int apart = kStatLanes / 2; apart > 0; apart /= 2) {
    for (int j = 0; j < apart; ++j) lanes[j] += lanes[j + apart];
  }
  return lanes[0];
}

// The squares of finite floats cannot overflow a double sum, so the values need a second look only if the sum is not finite.
// value(i) is element i.
template <class Value>
void finish_statistics(double* lanes, const Value& value, int64_t n, double* stats) {
  stats[0] = add_lanes(lanes);
  int64_t bad = 0;
  if (!std::isfinite(stats[0])) {
    for (int64_t i = 0; i < n; ++i) bad += !std::isfinite(value(i));
  }
  stats[1] = static_cast<double>(bad);
}

}  // namespace ds::kernels
