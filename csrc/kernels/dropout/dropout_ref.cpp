// SPDX-License-Identifier: Apache-2.0
#include <vector>

#include "kernels/dispatch.h"
#include "kernels/dropout/dropout.h"
#include "kernels/philox.h"

namespace ds::kernels {
namespace {

// 0 or 1 / (1 - p).
double factor(const Dropout& d, int64_t element) {
  const uint32_t word = philox_element(d.seed, d.offset, static_cast<uint64_t>(element));
  return philox_below(word, philox_threshold(d.p)) ? 0.0 : 1.0 / (1.0 - d.p);
}

}  // namespace

void dropout_add_ref(DType dtype, const void* x, const float* bias, const void* residual, void* y, const Dropout& dropout,
                     int64_t first_row, int64_t rows, int64_t cols) {
  dispatch_float(dtype, "x", [&](auto tag) {
    using Raw = typename decltype(tag)::Raw;
    for (int64_t i = 0; i < rows * cols; ++i) {
      const double scale = factor(dropout, first_row * cols + i);
      const double in = tag.load(static_cast<const Raw*>(x)[i]) + (bias != nullptr ? double{bias[i % cols]} : 0.0);
      const double kept = scale == 0.0 ? 0.0 : in * scale;
      static_cast<Raw*>(y)[i] = tag.store(static_cast<float>(tag.load(static_cast<const Raw*>(residual)[i]) + kept));
    }
  });
}

void dropout_add_backward_ref(DType dtype, const void* dy, void* dx, float* dbias, const Dropout& dropout, int64_t first_row, int64_t rows,
                              int64_t cols) {
  std::vector<double> sums(static_cast<size_t>(cols), 0.0);
  dispatch_float(dtype, "dy", [&](auto tag) {
    using Raw = typename decltype(tag)::Raw;
    for (int64_t i = 0; i < rows * cols; ++i) {
      const double scale = factor(dropout, first_row * cols + i);
      const double grad = scale == 0.0 ? 0.0 : tag.load(static_cast<const Raw*>(dy)[i]) * scale;
      static_cast<Raw*>(dx)[i] = tag.store(static_cast<float>(grad));
      sums[static_cast<size_t>(i % cols)] += grad;
    }
  });
  for (int64_t c = 0; dbias != nullptr && c < cols; ++c) dbias[c] = static_cast<float>(sums[static_cast<size_t>(c)]);
}

}  // namespace ds::kernels
