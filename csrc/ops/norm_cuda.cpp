// SPDX-License-Identifier: Apache-2.0
// The norms on a GPU.
#ifdef DS_WITH_CUDA
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include "ops/arguments.h"
#include "ops/derivative.h"
#include "ops/norm.h"

namespace ds::ops {
namespace {

using kernels::Norm;

at::Tensor contiguous_or_undefined(const at::Tensor& t) { return t.defined() ? t.contiguous() : t; }
const float* floats(const at::Tensor& t) { return static_cast<const float*>(data(t)); }
float* mutable_floats(const at::Tensor& t) { return static_cast<float*>(mutable_data(t)); }
int64_t rows_of(const at::Tensor& x) { return x.size(-1) == 0 ? 0 : x.numel() / x.size(-1); }

kernels::NormParameters parameters_of(const at::Tensor& weight, const at::Tensor& bias, double offset) {
  const DType dtype = weight.defined() ? to_dtype(weight.scalar_type()) : bias.defined() ? to_dtype(bias.scalar_type()) : DType::F32;
  return {data(weight), data(bias), dtype, static_cast<float>(offset)};
}

}  // namespace

Normed norm_forward_cuda(const NormInputs& in) {
  check_norm(in);
  const OnGpu gpu(in.x);
  const at::Tensor x = in.x.contiguous(), residual = contiguous_or_undefined(in.residual);
  const at::Tensor weight = contiguous_or_undefined(in.weight), bias = contiguous_or_undefined(in.bias);
  const auto statistic = [&] {
    const at::IntArrayRef leading = x.sizes().slice(0, static_cast<size_t>(x.dim() - 1));
    const auto options = x.options().dtype(at::kFloat);
    return x.size(-1) == 0 ? at::zeros(leading, options) : at::empty(leading, options);
  };
  Normed out{at::empty(x.sizes(), x.options()), residual.defined() ? at::empty(x.sizes(), x.options()) : at::Tensor(),
             in.norm == Norm::Layer ? statistic() : at::Tensor(), statistic()};
  const kernels::NormForward arguments{in.norm, to_dtype(x.scalar_type()), x.size(-1), static_cast<float>(in.eps), data(x), data(residual),
                                       nullptr, nullptr, mutable_data(out.h), mutable_data(out.y), mutable_floats(out.mean),
                                       mutable_floats(out.rstd)};
  kernels::norm_forward(arguments, parameters_of(weight, bias, in.weight_offset), rows_of(x), gpu.stream());
  return out;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> norm_backward_cuda(const NormGradInputs& in) {
  check_norm_backward(in);
  const OnGpu gpu(in.h);
  const bool layer = in.norm == Norm::Layer;
  const at::Tensor dy = in.dy.contiguous(), h = in.h.contiguous(), dh = contiguous_or_undefined(in.dh);
  const at::Tensor mean = layer ? in.mean.contiguous() : at::Tensor(), rstd = in.rstd.contiguous();
  const at::Tensor weight = contiguous_or_undefined(in.weight);
  const at::Tensor dx = in.in_place ? taken(in.dy, "dy", {h, dh, weight, mean, rstd}) : at::empty(h.sizes(), h.options());
  const int64_t rows = rows_of(h), columns = h.size(-1);
  const kernels::NormBackward arguments{in.norm, to_dtype(h.scalar_type()), columns, data(dy), data(dh), data(h), nullptr,
                                        floats(mean), floats(rstd), mutable_data(dx)};
  const auto options = h.options().dtype(in.parameter_dtype.value_or(at::kFloat));
  const bool wanted = in.parameter_dtype.has_value();
  const kernels::NormParameters parameters = parameters_of(weight, at::Tensor(), in.weight_offset);
  if (!wanted || rows == 0) {
    kernels::norm_backward(arguments, parameters, rows, gpu.stream());
    const at::Tensor none = at::zeros({wanted ? columns : 0}, options);
    return {dx, none, layer ? none.clone() : at::Tensor()};
  }
  const at::Tensor workspace = at::empty({kernels::cuda_norm_sums_bytes(in.norm, rows, columns)}, h.options().dtype(at::kByte));
  const at::Tensor sums = at::empty({columns * (layer ? 2 : 1)}, options);
  const kernels::ParameterGradients gradients{mutable_data(sums), to_dtype(*in.parameter_dtype), mutable_data(workspace)};
  kernels::norm_backward(arguments, parameters, rows, gradients, gpu.stream());
  if (!layer) return {dx, sums, at::Tensor()};
  // Outputs of an operator may not share memory.
  return {dx, sums.narrow(0, 0, columns).clone(), sums.narrow(0, columns, columns).clone()};
}

}  // namespace ds::ops
#endif
