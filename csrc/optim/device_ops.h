// SPDX-License-Identifier: Apache-2.0
// The kernels over tensors, wherever these lie: CPU slices are cut over at::parallel_for, CUDA slices launch on the
// current stream. Cuts are at fixed places, so the number of threads changes no bit.
#pragma once

#include <ATen/core/Tensor.h>

#include "base/dtype.h"
#include "kernels/optim/optim.h"
#include "ops/arguments.h"

namespace ds::optim {

using ops::to_dtype;

// All tensors are contiguous and one-dimensional; see kernels/reduce/reduce.h for what each does.
// stats: double[2] on the tensors' device, overwritten with (sum of squares, number of non-finite values).
void reduce_sum(const at::Tensor& dst, const void* const* srcs, int nsrc, DType src_dtype, float scale, bool accumulate,
                const at::Tensor& stats);
void copy_scale(const at::Tensor& dst, const at::Tensor& src, float scale);
void accumulate(const at::Tensor& dst, const at::Tensor& src, float scale);
void sum_squares(const at::Tensor& x, const at::Tensor& stats);
int64_t first_nonfinite(const void* src, DType dtype, int64_t n, at::Device device);

// Elementwise updates; `low` may be undefined, `g` is fp32, bf16 or fp16. Where p is int16 it holds the low bits of split masters (split_master.h)
// whose weights are `low`.
void adam(const kernels::Adam& h, float grad_scale, const at::Tensor& p, const at::Tensor& g, const at::Tensor& m,
          const at::Tensor& v, const at::Tensor& low);
void lion(const kernels::Lion& h, float grad_scale, const at::Tensor& p, const at::Tensor& g, const at::Tensor& m,
          const at::Tensor& low);
void adagrad(const kernels::Adagrad& h, float grad_scale, const at::Tensor& p, const at::Tensor& g, const at::Tensor& sum,
             const at::Tensor& low);
void sgd(const kernels::Sgd& h, float grad_scale, const at::Tensor& p, const at::Tensor& g, const at::Tensor& buf,
         const at::Tensor& low);
// norms: double[2] on the tensors' device, added to.
void lamb_direction(const kernels::Lamb& h, float grad_scale, const at::Tensor& p, const at::Tensor& g, const at::Tensor& m,
                    const at::Tensor& v, const at::Tensor& u, const at::Tensor& norms);
void lamb_apply(float lr_times_ratio, const at::Tensor& p, const at::Tensor& u, const at::Tensor& low);
// By the ratio of complete norms, which is written to `ratio`, a double beside them: nothing waits for a GPU.
void lamb_apply(const kernels::LambScale& scale, const at::Tensor& norms, const at::Tensor& ratio, const at::Tensor& p, const at::Tensor& u,
                const at::Tensor& low);

}  // namespace ds::optim
