// SPDX-License-Identifier: Apache-2.0
#include <cmath>

#include "kernels/dispatch.h"
#include "kernels/norm/norm.h"

namespace ds::kernels {
namespace {

template <class T>
void forward_row(const NormForward& a, int64_t row) {
  using Raw = typename T::Raw;
  const int64_t n = a.columns;
  const Raw* x = static_cast<const Raw*>(a.x) + row * n;
  Raw* y = static_cast<Raw*>(a.y) + row * n;
  if (a.residual != nullptr) {
    const Raw* residual = static_cast<const Raw*>(a.residual) + row * n;
    Raw* h = static_cast<Raw*>(a.h) + row * n;
    for (int64_t i = 0; i < n; ++i) h[i] = T::store(T::load(x[i]) + T::load(residual[i]));
    x = h;
  }
  double mean = 0.0, squares = 0.0;
  if (a.norm == Norm::Layer) {
    for (int64_t i = 0; i < n; ++i) mean += static_cast<double>(T::load(x[i]));
    mean /= static_cast<double>(n);
    a.mean[row] = static_cast<float>(mean);
  }
  for (int64_t i = 0; i < n; ++i) {
    const double centred = static_cast<double>(T::load(x[i])) - mean;
    squares += centred * centred;
  }
  const double rstd = 1.0 / std::sqrt(squares / static_cast<double>(n) + static_cast<double>(a.eps));
  a.rstd[row] = static_cast<float>(rstd);
  for (int64_t i = 0; i < n; ++i) {
    double value = (static_cast<double>(T::load(x[i])) - mean) * rstd;
    if (a.weight != nullptr) value *= static_cast<double>(a.weight[i]);
    if (a.bias != nullptr) value += static_cast<double>(a.bias[i]);
    y[i] = T::store(static_cast<float>(value));
  }
}

template <class T>
void backward_row(const NormBackward& a, int64_t row, float* dweight, float* dbias) {
  using Raw = typename T::Raw;
  const int64_t n = a.columns, first = row * n;
  const double mean = a.norm == Norm::Layer ? static_cast<double>(a.mean[row]) : 0.0;
  const double rstd = static_cast<double>(a.rstd[row]);
  const auto value = [&](const void* p, int64_t i) { return static_cast<double>(T::load(static_cast<const Raw*>(p)[first + i])); };
  const auto normal = [&](int64_t i) { return (value(a.h, i) - mean) * rstd; };
  const auto grad = [&](int64_t i) { return value(a.dy, i) * (a.weight != nullptr ? static_cast<double>(a.weight[i]) : 1.0); };
  double grad_mean = 0.0, along = 0.0;
  for (int64_t i = 0; i < n; ++i) {
    if (a.norm == Norm::Layer) grad_mean += grad(i) / static_cast<double>(n);
    along += grad(i) * normal(i) / static_cast<double>(n);
    if (dweight != nullptr) dweight[i] += static_cast<float>(value(a.dy, i) * normal(i));
    if (dbias != nullptr) dbias[i] += static_cast<float>(value(a.dy, i));
  }
  for (int64_t i = 0; i < n; ++i) {
    double dx = (grad(i) - grad_mean - normal(i) * along) * rstd;
    if (a.dh != nullptr) dx += value(a.dh, i);
    static_cast<Raw*>(a.dx)[first + i] = T::store(static_cast<float>(dx));
  }
}

}  // namespace

void norm_forward_ref(const NormForward& a, int64_t begin, int64_t end) {
  if (a.columns == 0) return;
  dispatch_float(a.dtype, "x", [&](auto tag) {
    for (int64_t row = begin; row < end; ++row) forward_row<decltype(tag)>(a, row);
  });
}

void norm_backward_ref(const NormBackward& a, int64_t begin, int64_t end, float* dweight, float* dbias) {
  dispatch_float(a.dtype, "dy", [&](auto tag) {
    for (int64_t row = begin; row < end; ++row) backward_row<decltype(tag)>(a, row, dweight, dbias);
  });
}

}  // namespace ds::kernels
