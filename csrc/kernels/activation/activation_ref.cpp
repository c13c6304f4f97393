// SPDX-License-Identifier: Apache-2.0
#include <cmath>
#include <vector>

#include "kernels/activation/activation.h"
#include "kernels/dispatch.h"

namespace ds::kernels {
namespace {

constexpr double kRootHalf = 0.70710678118654752440;          // 1 / sqrt(2)
constexpr double kRootTwoOverPi = 0.79788456080286535588;     // sqrt(2 / pi)
constexpr double kInverseRootTwoPi = 0.39894228040143267794;  // 1 / sqrt(2 pi)
constexpr double kCubic = 0.044715;

double logistic(double x) { return 1.0 / (1.0 + std::exp(-x)); }

double at(const float* bias, int64_t i) { return bias != nullptr ? bias[i] : 0.0; }

}  // namespace

double activation_value(Activation act, double x) {
  switch (act) {
    case Activation::GeluErf: return 0.5 * x * std::erfc(-x * kRootHalf);
    case Activation::GeluTanh: return x * logistic(2.0 * kRootTwoOverPi * (x + kCubic * x * x * x));
    case Activation::Silu: return x * logistic(x);
    case Activation::Relu: return x < 0.0 ? 0.0 : x;
  }
  DS_FAIL_VALUE("act: not an activation: " << static_cast<int>(act));
}

double activation_slope(Activation act, double x) {
  switch (act) {
    case Activation::GeluErf: return 0.5 * std::erfc(-x * kRootHalf) + x * kInverseRootTwoPi * std::exp(-0.5 * x * x);
    case Activation::GeluTanh: {
      const double z = 2.0 * kRootTwoOverPi * (x + kCubic * x * x * x);
      const double s = logistic(z), rest = logistic(-z);
      return s + x * s * rest * 2.0 * kRootTwoOverPi * (1.0 + 3.0 * kCubic * x * x);
    }
    case Activation::Silu: return logistic(x) * (1.0 + x * logistic(-x));
    case Activation::Relu: return x <= 0.0 ? 0.0 : 1.0;
  }
  DS_FAIL_VALUE("act: not an activation: " << static_cast<int>(act));
}

void bias_act_ref(Activation act, DType dtype, const void* x, const float* bias, void* y, int64_t rows, int64_t cols) {
  dispatch_float(dtype, "x", [&](auto tag) {
    using Raw = typename decltype(tag)::Raw;
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < cols; ++c) {
        const double in = tag.load(static_cast<const Raw*>(x)[r * cols + c]) + at(bias, c);
        static_cast<Raw*>(y)[r * cols + c] = tag.store(static_cast<float>(activation_value(act, in)));
      }
    }
  });
}

void bias_act_backward_ref(Activation act, DType dtype, const void* dy, const void* x, const float* bias, void* dx, float* dbias,
                           int64_t rows, int64_t cols) {
  std::vector<double> sums(static_cast<size_t>(cols), 0.0);
  dispatch_float(dtype, "x", [&](auto tag) {
    using Raw = typename decltype(tag)::Raw;
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < cols; ++c) {
        const int64_t i = r * cols + c;
        const double grad = tag.load(static_cast<const Raw*>(dy)[i]) *
                            activation_slope(act, tag.load(static_cast<const Raw*>(x)[i]) + at(bias, c));
        static_cast<Raw*>(dx)[i] = tag.store(static_cast<float>(grad));
        sums[static_cast<size_t>(c)] += grad;
      }
    }
  });
  for (int64_t c = 0; dbias != nullptr && c < cols; ++c) dbias[c] = static_cast<float>(sums[static_cast<size_t>(c)]);
}

void gated_ref(Activation act, DType dtype, const GatedInput& in, void* y, int64_t rows, int64_t cols) {
  dispatch_float(dtype, "gate", [&](auto tag) {
    using Raw = typename decltype(tag)::Raw;
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < cols; ++c) {
        const double gate = tag.load(static_cast<const Raw*>(in.gate)[r * in.stride + c]) + at(in.gate_bias, c);
        const double up = tag.load(static_cast<const Raw*>(in.up)[r * in.stride + c]) + at(in.up_bias, c);
        static_cast<Raw*>(y)[r * cols + c] = tag.store(static_cast<float>(activation_value(act, gate) * up));
      }
    }
  });
}

void gated_backward_ref(Activation act, DType dtype, const GatedInput& in, const void* dy, const GatedGrads& out, int64_t rows,
                        int64_t cols) {
  std::vector<double> sums(static_cast<size_t>(2 * cols), 0.0);
  dispatch_float(dtype, "gate", [&](auto tag) {
    using Raw = typename decltype(tag)::Raw;
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < cols; ++c) {
        const double gate = tag.load(static_cast<const Raw*>(in.gate)[r * in.stride + c]) + at(in.gate_bias, c);
        const double up = tag.load(static_cast<const Raw*>(in.up)[r * in.stride + c]) + at(in.up_bias, c);
        const double grad = tag.load(static_cast<const Raw*>(dy)[r * cols + c]);
        const double dgate = grad * up * activation_slope(act, gate), dup = grad * activation_value(act, gate);
        static_cast<Raw*>(out.gate)[r * out.stride + c] = tag.store(static_cast<float>(dgate));
        static_cast<Raw*>(out.up)[r * out.stride + c] = tag.store(static_cast<float>(dup));
        sums[static_cast<size_t>(c)] += dgate;
        sums[static_cast<size_t>(cols + c)] += dup;
      }
    }
  });
  for (int64_t c = 0; out.gate_bias != nullptr && c < cols; ++c) {
    out.gate_bias[c] = static_cast<float>(sums[static_cast<size_t>(c)]);
    out.up_bias[c] = static_cast<float>(sums[static_cast<size_t>(cols + c)]);
  }
}

}  // namespace ds::kernels
