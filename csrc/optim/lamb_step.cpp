// SPDX-License-Identifier: Apache-2.0
#include <ATen/Functions.h>

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

// norms: double[2], zero; ratio: one double.
void step_one(const kernels::Lamb& h, const kernels::LambScale& scale, float grad_scale, const Row& row, const at::Tensor& norms,
              const at::Tensor& ratio) {
  const kernels::Slice& a = row.slice;
  const at::Device device = norms.device();
  const at::Tensor g = at::from_blob(const_cast<void*>(a.g), {row.numel}, at::TensorOptions().dtype(scalar_type(a.g_dt)).device(device));
  const Wide p(a.p, row.numel, device), m(a.states[0], row.numel, device), v(a.states[1], row.numel, device);
  const at::Tensor u = at::empty_like(p.values());
  lamb_direction(h, grad_scale, p.values(), g, m.values(), v.values(), u, norms);
  lamb_apply(scale, norms, ratio, p.values(), u, at::Tensor());
  p.close(a.dice);
  m.close(a.dice);
  v.close(a.dice);
}

}  // namespace

at::Tensor lamb_step(const kernels::Lamb& h, double min_coeff, double max_coeff, float grad_scale, const Tensors& params, const Tensors& grads,
                     const Tensors& exp_avgs, const Tensors& exp_avg_sqs, const Storage& storage) {
  const Rows rows = checked_rows(params, grads, {{"exp_avgs", &exp_avgs}, {"exp_avg_sqs", &exp_avg_sqs}}, storage, /*keep_empty=*/true);
#ifndef DS_WITH_CUDA
  require_cpu(rows.device);
#endif
  const int64_t count = static_cast<int64_t>(rows.rows.size());
  const auto options = at::TensorOptions().dtype(at::kDouble).device(rows.device);
  const at::Tensor norms = at::zeros({count, 2}, options), ratios = at::ones({count}, options);
  for (int64_t i = 0; i < count; ++i) {
    const Row& row = rows.rows[static_cast<size_t>(i)];
    if (row.numel != 0) step_one(h, {h.lr, min_coeff, max_coeff}, grad_scale, row, norms[i], ratios[i]);
  }
  return ratios;
}

}  // namespace ds::optim
