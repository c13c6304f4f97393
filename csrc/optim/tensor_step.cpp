// SPDX-License-Identifier: Apache-2.0
#include "optim/tensor_step.h"

#include <tuple>

#include "optim/many_device.h"

namespace ds::optim {
namespace {

using kernels::Rule;
using kernels::Slice;

#ifdef DS_WITH_CUDA
// Rows of one launch agree in these.
auto signature(const Slice& s) {
  return std::make_tuple(s.p.form, s.g_dt, s.states[0].form, s.states[1].form, s.low != nullptr, s.low_dt);
}

void step_on_gpu(const Rule& rule, float grad_scale, const Rows& rows) {
  std::vector<bool> done(rows.rows.size(), false);
  for (size_t first = 0; first < rows.rows.size(); ++first) {
    if (done[first]) continue;
    const Slice& like = rows.rows[first].slice;
    std::vector<Slice> slices;
    std::vector<int64_t> numels;
    for (size_t r = first; r < rows.rows.size(); ++r) {
      if (done[r] || signature(rows.rows[r].slice) != signature(like)) continue;
      done[r] = true;
      slices.push_back(rows.rows[r].slice);
      numels.push_back(rows.rows[r].numel);
    }
    const kernels::ManyPlan plan = kernels::many_step_plan(numels);
    const DeviceTable table(plan.bytes, rows.device, [&](void* host) { kernels::write_step_table(plan, slices, numels, host); });
    kernels::step_many(rule, grad_scale, like, plan, table.data(), table.stream());
  }
}
#endif

void step_rows(const Rule& rule, float grad_scale, const Rows& rows) {
  if (rows.empty()) return;
#ifdef DS_WITH_CUDA
  if (rows.device.is_cuda()) return step_on_gpu(rule, grad_scale, rows);
#endif
  require_cpu(rows.device);
  std::vector<int64_t> numels;
  numels.reserve(rows.rows.size());
  for (const Row& row : rows.rows) numels.push_back(row.numel);
  for_row_pieces(numels, [&](size_t r, int64_t begin, int64_t end) {
    const Slice& slice = rows.rows[r].slice;
    kernels::step(rule, grad_scale, begin == 0 ? slice : slice.at(begin), end - begin);
  });
}

}  // namespace

void adam_step(const kernels::Adam& h, float grad_scale, const Tensors& params, const Tensors& grads, const Tensors& exp_avgs,
               const Tensors& exp_avg_sqs, const Storage& storage) {
  step_rows(kernels::AdamConstants(h), grad_scale,
            checked_rows(params, grads, {{"exp_avgs", &exp_avgs}, {"exp_avg_sqs", &exp_avg_sqs}}, storage));
}

void lion_step(const kernels::Lion& h, float grad_scale, const Tensors& params, const Tensors& grads, const Tensors& exp_avgs,
               const Storage& storage) {
  step_rows(kernels::LionConstants(h), grad_scale, checked_rows(params, grads, {{"exp_avgs", &exp_avgs}}, storage));
}

void adagrad_step(const kernels::Adagrad& h, float grad_scale, const Tensors& params, const Tensors& grads, const Tensors& sums,
                  const Storage& storage) {
  step_rows(kernels::AdagradConstants(h), grad_scale, checked_rows(params, grads, {{"sums", &sums}}, storage));
}

void sgd_step(const kernels::Sgd& h, float grad_scale, const Tensors& params, const Tensors& grads, const Tensors& momentum_buffers,
              const Storage& storage) {
  std::vector<NamedStates> states;
  if (h.momentum != 0.0) states.push_back({"momentum_buffers", &momentum_buffers});
  step_rows(kernels::SgdConstants(h), grad_scale, checked_rows(params, grads, states, storage));
}

}  // namespace ds::optim
