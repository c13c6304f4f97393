// SPDX-License-Identifier: Apache-2.0
// One optimizer update of whole parameters, as torch.optim does it: lists of tensors of any shape, on the CPU or, if CUDA code was built,
// on a GPU (one launch for a list whose tensors agree in their dtypes). Parameters and gradients are float32, bfloat16 or float16, states those or
// 8-bit codes; the arithmetic is float32 and what is narrower is rounded when written (tensor_rows.h: Storage). Tensors must be dense without
// overlap, states laid out like their parameter; a gradient laid out otherwise is copied.
#pragma once

#include "optim/tensor_rows.h"

namespace ds::optim {

void adam_step(const kernels::Adam& h, float grad_scale, const Tensors& params, const Tensors& grads, const Tensors& exp_avgs,
               const Tensors& exp_avg_sqs, const Storage& storage = {});
void lion_step(const kernels::Lion& h, float grad_scale, const Tensors& params, const Tensors& grads, const Tensors& exp_avgs,
               const Storage& storage = {});
void adagrad_step(const kernels::Adagrad& h, float grad_scale, const Tensors& params, const Tensors& grads, const Tensors& sums,
                  const Storage& storage = {});
// momentum_buffers is empty when h.momentum is 0.
void sgd_step(const kernels::Sgd& h, float grad_scale, const Tensors& params, const Tensors& grads, const Tensors& momentum_buffers,
              const Storage& storage = {});
// Returns the parameters' trust ratios ||p|| / ||u||, clamped to [min_coeff, max_coeff], 1 where a norm is zero: float64, where the parameters
// are, so that nobody waits for a GPU who does not look at them. What is not float32 is widened one parameter at a time.
at::Tensor lamb_step(const kernels::Lamb& h, double min_coeff, double max_coeff, float grad_scale, const Tensors& params, const Tensors& grads,
                     const Tensors& exp_avgs, const Tensors& exp_avg_sqs, const Storage& storage = {});

}  // namespace ds::optim
