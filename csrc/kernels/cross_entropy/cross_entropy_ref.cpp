// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/cross_entropy/cross_entropy.h"
#include "kernels/dispatch.h"

namespace ds::kernels {

int64_t find_bad_label(const int64_t* labels, int64_t n, const CrossEntropy& c, int64_t* counted) {
  int64_t kept = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (labels[i] == c.ignored) continue;
    if (labels[i] < 0 || labels[i] >= c.columns) return i;
    ++kept;
  }
  *counted = kept;
  return -1;
}

BadLabel bad_label_of(uint64_t word) { return {static_cast<int64_t>(word >> 32), static_cast<int32_t>(static_cast<uint32_t>(word))}; }

void cross_entropy_ref(float* loss, float* stats, const void* x, DType dtype, const int64_t* labels, const CrossEntropy& c, int64_t begin,
                       int64_t end) {
  dispatch_float(dtype, "x", [&](auto tag) {
    for (int64_t r = begin; r < end; ++r) {
      if (labels[r] == c.ignored) {
        loss[r] = stats[2 * r] = 0.0f;
        stats[2 * r + 1] = 1.0f;
        continue;
      }
      auto* row = static_cast<const typename decltype(tag)::Raw*>(x) + r * c.columns;
      double largest = -std::numeric_limits<double>::infinity(), sum = 0.0, total = 0.0;
      for (int64_t j = 0; j < c.columns; ++j) largest = std::max(largest, double{tag.load(row[j])});
      for (int64_t j = 0; j < c.columns; ++j) {
        sum += std::exp(tag.load(row[j]) - largest);
        total += tag.load(row[j]);
      }
      const double l = largest + std::log(sum), smoothing = c.smoothing;
      stats[2 * r] = static_cast<float>(largest);
      stats[2 * r + 1] = static_cast<float>(sum);
      const double mean = smoothing == 0.0 ? 0.0 : total / static_cast<double>(c.columns);  // of infinities nobody asked for
      loss[r] = static_cast<float>((1.0 - smoothing) * (l - tag.load(row[labels[r]])) + smoothing * (l - mean) + c.z_loss * l * l);
    }
  });
}

void cross_entropy_backward_ref(void* dx, const void* x, DType dtype, const int64_t* labels, const float* stats, const float* weights,
                                float weight, const CrossEntropy& c, int64_t begin, int64_t end) {
  dispatch_float(dtype, "x", [&](auto tag) {
    using Raw = typename decltype(tag)::Raw;
    for (int64_t r = begin; r < end; ++r) {
      auto* row = static_cast<const Raw*>(x) + r * c.columns;
      auto* out = static_cast<Raw*>(dx) + r * c.columns;
      if (labels[r] == c.ignored) {
        std::fill_n(out, c.columns, Raw{0});
        continue;
      }
      const double w = weights != nullptr ? weights[r] : weight, largest = stats[2 * r], sum = stats[2 * r + 1], l = largest + std::log(sum);
      for (int64_t j = 0; j < c.columns; ++j) {
        double g = (1.0 + 2.0 * c.z_loss * l) * std::exp(tag.load(row[j]) - largest) / sum - double{c.smoothing} / static_cast<double>(c.columns);
        if (j == labels[r]) g -= 1.0 - double{c.smoothing};
        out[j] = tag.store(static_cast<float>(w * g));
      }
    }
  });
}

}  // namespace ds::kernels
