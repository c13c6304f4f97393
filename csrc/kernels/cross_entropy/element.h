// SPDX-License-Identifier: Apache-2.0
// What a row's statistics make of its loss and its gradient: one text for CPU and GPU.
#pragma once

#include <cmath>

#include "kernels/cross_entropy/cross_entropy.h"

#ifdef __CUDACC__
#define DS_CE_FN __host__ __device__ __forceinline__
#else
#define DS_CE_FN inline
#endif

namespace ds::kernels {

DS_CE_FN bool is_out_of_range(const CrossEntropy& c, int64_t label) {
  return static_cast<uint64_t>(label) >= static_cast<uint64_t>(c.columns) && label != c.ignored;
}

// Row and label in one word, so that one store says both. It is not 0: label 0 is in range.
DS_CE_FN uint64_t bad_label_word(int64_t row, int64_t label) {
  const int64_t r = row > INT32_MAX ? INT32_MAX : row, l = label > INT32_MAX ? INT32_MAX : label < INT32_MIN ? INT32_MIN : label;
  return static_cast<uint64_t>(r) << 32 | static_cast<uint32_t>(static_cast<int32_t>(l));
}

struct RowStats {
  float largest;
  float sum;  // of exp(x - largest)
};

// x_label: the label's logit; total: the sum of all logits, looked at only if there is smoothing.
DS_CE_FN float row_loss(const CrossEntropy& c, const RowStats& s, float x_label, float total) {
  const float log_sum = logf(s.sum), lse = s.largest + log_sum;
  float loss = (s.largest - x_label) + log_sum;
  if (c.smoothing != 0.0f) loss = (1.0f - c.smoothing) * loss + c.smoothing * (lse - total / static_cast<float>(c.columns));
  return loss + c.z_loss * lse * lse;
}

// d x[j] = factor * exp(x[j] - largest) - everywhere, and at the label less `weight` and plus `kept`, its share of the smoothing.
struct RowGradient {
  float factor, everywhere, weight, kept;

  DS_CE_FN RowGradient(const CrossEntropy& c, const RowStats& s, float weight_) : weight(weight_) {
    const float lse = c.z_loss == 0.0f ? 0.0f : s.largest + logf(s.sum);
    factor = weight * (1.0f + 2.0f * c.z_loss * lse) / s.sum;
    everywhere = weight * c.smoothing / static_cast<float>(c.columns);
    kept = weight * c.smoothing - everywhere;
  }
  DS_CE_FN float at_label(float exponential) const { return (factor * exponential - weight) + kept; }  // 0 where there is one column
};

}  // namespace ds::kernels
