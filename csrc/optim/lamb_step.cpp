// SPDX-License-Identifier: Apache-2.0
#include <ATen/Functions.h>

#include <algorithm>
#include <cmath>

#include "optim/device_ops.h"
#include "optim/many_device.h"
#include "optim/split_master.h"
#include "optim/tensor_step.h"

namespace ds::optim {
namespace {

using kernels::Dice;
using kernels::Form;
using kernels::Stored;

// A float32 tensor over an array: the array itself, or a copy that `close` stores.
class Wide {
 public:
  Wide(const Stored& array, int64_t numel, at::Device device) : array_(array) {
    const auto options = at::TensorOptions().dtype(at::kFloat).device(device);
    if (array.form == Form::F32) {
      values_ = at::from_blob(array.data, {numel}, options);
    } else {
      values_ = at::empty({numel}, options);
      widen(array, values_);
    }
  }
  const at::Tensor& values() const { return values_; }
  void close(const Dice& dice) const {
    if (array_.form != Form::F32) narrow(values_, array_, dice);
  }

 private:
  Stored array_;
  at::Tensor values_;
};

at::ScalarType scalar_type(DType t) { return t == DType::F32 ? at::kFloat : t == DType::BF16 ? at::kBFloat16 : at::kHalf; }

double step_one(const kernels::Lamb& h, double min_coeff, double max_coeff, float grad_scale, const Row& row, at::Device device) {
  const kernels::Slice& a = row.slice;
  const at::Tensor g = at::from_blob(const_cast<void*>(a.g), {row.numel}, at::TensorOptions().dtype(scalar_type(a.g_dt)).device(device));
  const Wide p(a.p, row.numel, device), m(a.states[0], row.numel, device), v(a.states[1], row.numel, device);
  const at::Tensor u = at::empty_like(p.values());
  const at::Tensor norms = at::zeros({2}, u.options().dtype(at::kDouble));
  lamb_direction(h, grad_scale, p.values(), g, m.values(), v.values(), u, norms);
  const at::Tensor host = norms.cpu();
  const double p_norm = std::sqrt(host.data_ptr<double>()[0]), u_norm = std::sqrt(host.data_ptr<double>()[1]);
  const double ratio = p_norm != 0.0 && u_norm != 0.0 ? std::clamp(p_norm / u_norm, min_coeff, max_coeff) : 1.0;
  lamb_apply(static_cast<float>(h.lr * ratio), p.values(), u, at::Tensor());
  p.close(a.dice);
  m.close(a.dice);
  v.close(a.dice);
  return ratio;
}

}  // namespace

std::vector<double> lamb_step(const kernels::Lamb& h, double min_coeff, double max_coeff, float grad_scale, const Tensors& params,
                              const Tensors& grads, const Tensors& exp_avgs, const Tensors& exp_avg_sqs, const Storage& storage) {
  const Rows rows = checked_rows(params, grads, {{"exp_avgs", &exp_avgs}, {"exp_avg_sqs", &exp_avg_sqs}}, storage, /*keep_empty=*/true);
#ifndef DS_WITH_CUDA
  require_cpu(rows.device);
#endif
  std::vector<double> ratios;
  for (const Row& row : rows.rows) {
    ratios.push_back(row.numel == 0 ? 1.0 : step_one(h, min_coeff, max_coeff, grad_scale, row, rows.device));
  }
  return ratios;
}

}  // namespace ds::optim
