// SPDX-License-Identifier: Apache-2.0
// deepspeed::layer_norm, deepspeed::rms_norm, their variants with a residual, and their backwards, on tensors. They normalise over the
// last dimension; x and residual share shape and dtype; weight and bias are [columns], both of x's dtype or both float32.
// Outputs are contiguous; mean and rstd are float32 of x's shape without its last dimension. The CPU's results do not depend on the number
// of threads. A gradient of a gradient is refused when it is asked for.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

#include "kernels/norm/norm.h"

namespace ds::ops {

// What forward leaves: h is undefined without a residual, mean for RMS norm.
struct Normed {
  at::Tensor y, h, mean, rstd;
};

// Undefined tensors stand for those that are left out. weight_offset is added to weight in float32.
struct NormInputs {
  kernels::Norm norm;
  at::Tensor x, residual, weight, bias;
  double eps;
  double weight_offset;
};
Normed norm_forward_cpu(const NormInputs& in);

// dh may be undefined. parameter_dtype: of dweight (and dbias); absent: they are not wanted and come back with no elements. in_place: dx
// takes the memory of dy.
struct NormGradInputs {
  kernels::Norm norm;
  at::Tensor dy, dh, h, weight, mean, rstd;
  double weight_offset;
  std::optional<at::ScalarType> parameter_dtype;
  bool in_place = false;
};
std::tuple<at::Tensor, at::Tensor, at::Tensor> norm_backward_cpu(const NormGradInputs& in);

#ifdef DS_WITH_CUDA
Normed norm_forward_cuda(const NormInputs& in);
std::tuple<at::Tensor, at::Tensor, at::Tensor> norm_backward_cuda(const NormGradInputs& in);
#endif

// The checks of both devices; they blame the argument by name.
void check_norm(const NormInputs& in);
void check_norm_backward(const NormGradInputs& in);

}  // namespace ds::ops
