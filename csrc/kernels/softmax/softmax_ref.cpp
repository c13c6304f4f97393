// SPDX-License-Identifier: Apache-2.0
#include <cmath>
#include <limits>
#include <vector>

#include "kernels/dispatch.h"
#include "kernels/softmax/softmax.h"

namespace ds::kernels {
namespace {

double mask_value(const MaskView& m, int64_t i) {
  if (m.data == nullptr) return 0.0;
  if (m.dtype == DType::BOOL) return static_cast<const uint8_t*>(m.data)[i] != 0 ? -std::numeric_limits<double>::infinity() : 0.0;
  double value = 0.0;
  dispatch_float(m.dtype, "mask", [&](auto tag) { value = tag.load(static_cast<const typename decltype(tag)::Raw*>(m.data)[i]); });
  return value;
}

}  // namespace

void softmax_ref(void* y, const void* x, DType dtype, const SoftmaxRows& s, const MaskView& mask, int64_t begin, int64_t end) {
  dispatch_float(dtype, "x", [&](auto tag) {
    using Raw = typename decltype(tag)::Raw;
    std::vector<double> z(static_cast<size_t>(s.columns));
    for (int64_t row = begin; row < end; ++row) {
      auto* out = static_cast<Raw*>(y) + row * s.columns;
      auto* in = static_cast<const Raw*>(x) + row * s.columns;
      const int64_t visible = visible_columns(s, row), at = mask_offset(mask, row);
      double largest = -std::numeric_limits<double>::infinity(), sum = 0.0;
      for (int64_t j = 0; j < visible; ++j) {
        z[j] = double{s.scale} * tag.load(in[j]) + mask_value(mask, at + j);
        if (z[j] > largest || std::isnan(z[j])) largest = z[j];
      }
      const bool hidden = largest == -std::numeric_limits<double>::infinity();
      for (int64_t j = 0; j < visible; ++j) sum += z[j] = hidden ? 0.0 : std::exp(z[j] - largest);
      for (int64_t j = 0; j < s.columns; ++j) {
        out[j] = tag.store(j < visible && !hidden ? static_cast<float>(z[j] / sum) : 0.0f);
      }
    }
  });
}

void softmax_backward_ref(void* dx, const void* dy, const void* y, DType dtype, const SoftmaxRows& s, int64_t begin, int64_t end) {
  dispatch_float(dtype, "y", [&](auto tag) {
    using Raw = typename decltype(tag)::Raw;
    for (int64_t row = begin; row < end; ++row) {
      auto* out = static_cast<Raw*>(dx) + row * s.columns;
      auto* grad = static_cast<const Raw*>(dy) + row * s.columns;
      auto* p = static_cast<const Raw*>(y) + row * s.columns;
      const int64_t visible = visible_columns(s, row);
      double dot = 0.0;
      for (int64_t j = 0; j < visible; ++j) dot += double{tag.load(grad[j])} * double{tag.load(p[j])};
      for (int64_t j = 0; j < s.columns; ++j) {
        const double value = j < visible ? s.scale * double{tag.load(p[j])} * (double{tag.load(grad[j])} - dot) : 0.0;
        out[j] = tag.store(static_cast<float>(value));
      }
    }
  });
}

}  // namespace ds::kernels
