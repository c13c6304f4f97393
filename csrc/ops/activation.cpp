// SPDX-License-Identifier: Apache-2.0
// deepspeed::bias_act: act(x + bias), and its gradients. Nothing but the inputs is kept for the backward pass.
#include "ops/activation.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <string>
#include <tuple>

#include "ops/bias.h"
#include "ops/derivative.h"
#include "ops/fresh.h"
#include "ops/register.h"

namespace ds::ops {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

void check(const Tensor& x, const Tensor& bias) {
  check_float(x, "x");
  if (!bias.defined()) return;
  TORCH_CHECK_VALUE(x.dim() >= 1, "x must have a dimension for the bias");
  check_vector(bias, "bias", x.size(-1), x, "x");
}

Tensor bias_act_cpu(const Tensor& x_in, const OptionalTensor& bias_in, std::string_view act) {
  const Tensor bias = value_or_undefined(bias_in);
  check(x_in, bias);
  const auto activation = activation_named(act);
  const Tensor x = x_in.contiguous();
  Tensor y = at::empty(x.sizes(), x.options());
  const bool past_caches = is_past_caches(y);
  const Rows shape = rows_of(x, bias);
  const at::Tensor b = float_vector(bias);
  const DType dtype = to_dtype(x.scalar_type());
  const auto* from = static_cast<const char*>(x.const_data_ptr());
  auto* to = static_cast<char*>(y.mutable_data_ptr());
  const int64_t unit = static_cast<int64_t>(x.element_size());
  if (!bias.defined()) {
    for_chunks(shape.cols, kChunkElements, [&](int64_t, int64_t begin, int64_t end) {
      kernels::bias_act(activation, dtype, from + begin * unit, nullptr, {to + begin * unit, past_caches}, 1, end - begin);
    });
  } else {
    for_chunks(shape.rows, rows_in_chunk(shape.cols), [&](int64_t, int64_t begin, int64_t end) {
      const int64_t at = begin * shape.cols * unit;
      kernels::bias_act(activation, dtype, from + at, floats(b), {to + at, past_caches}, end - begin, shape.cols);
    });
  }
  return y;
}

// In place: dx is grad_in.
std::tuple<Tensor, Tensor> backward_cpu(const Tensor& grad_in, const Tensor& x_in, const OptionalTensor& bias_in, std::string_view act,
                                        bool in_place) {
  const Tensor bias = value_or_undefined(bias_in);
  check(x_in, bias);
  check_like(grad_in, "grad", x_in, "x");
  const auto activation = activation_named(act);
  const Tensor x = x_in.contiguous(), grad = grad_in.contiguous();
  Tensor dx = in_place ? taken(grad_in, "grad", {x}) : at::empty(x.sizes(), x.options());
  const bool past_caches = !in_place && is_past_caches(dx);
  const Rows shape = rows_of(x, bias);
  const DType dtype = to_dtype(x.scalar_type());
  const auto *dy = static_cast<const char*>(grad.const_data_ptr()), *from = static_cast<const char*>(x.const_data_ptr());
  auto* to = static_cast<char*>(dx.mutable_data_ptr());
  const int64_t unit = static_cast<int64_t>(x.element_size());
  if (!bias.defined()) {
    for_chunks(shape.cols, kChunkElements, [&](int64_t, int64_t begin, int64_t end) {
      const int64_t at = begin * unit;
      kernels::bias_act_backward(activation, dtype, dy + at, from + at, nullptr, {to + at, past_caches}, nullptr, 1, end - begin);
    });
    return {dx, no_gradient(x)};
  }
  const at::Tensor b = float_vector(bias);
  ColumnSums sums(shape.rows, shape.cols);
  for_chunks(shape.rows, sums.chunk(), [&](int64_t index, int64_t begin, int64_t end) {
    const int64_t at = begin * shape.cols * unit;
    kernels::bias_act_backward(activation, dtype, dy + at, from + at, floats(b), {to + at, past_caches}, sums.part(index), end - begin, shape.cols);
  });
  return {dx, sums.join(bias)};
}

#ifdef DS_WITH_CUDA
Tensor bias_act_cuda(const Tensor& x_in, const OptionalTensor& bias_in, std::string_view act) {
  const Tensor bias_any = value_or_undefined(bias_in);
  check(x_in, bias_any);
  const auto activation = activation_named(act);
  const OnGpu gpu(x_in);
  const Tensor x = x_in.contiguous(), bias = bias_any.defined() ? bias_any.contiguous() : bias_any;
  Tensor y = at::empty(x.sizes(), x.options());
  const Rows shape = rows_of(x, bias);
  const DType bias_dtype = bias.defined() ? to_dtype(bias.scalar_type()) : DType::F32;
  kernels::bias_act(activation, to_dtype(x.scalar_type()), data(x), data(bias), bias_dtype, mutable_data(y), shape.rows, shape.cols,
                    gpu.stream());
  return y;
}

std::tuple<Tensor, Tensor> backward_cuda(const Tensor& grad_in, const Tensor& x_in, const OptionalTensor& bias_in, std::string_view act,
                                         bool in_place) {
  const Tensor bias_any = value_or_undefined(bias_in);
  check(x_in, bias_any);
  check_like(grad_in, "grad", x_in, "x");
  const auto activation = activation_named(act);
  const OnGpu gpu(x_in);
  const Tensor x = x_in.contiguous(), grad = grad_in.contiguous(), bias = bias_any.defined() ? bias_any.contiguous() : bias_any;
  Tensor dx = in_place ? taken(grad_in, "grad", {x}) : at::empty(x.sizes(), x.options());
  const Rows shape = rows_of(x, bias);
  Tensor dbias = bias.defined() ? at::empty(bias.sizes(), bias.options()) : no_gradient(x);
  Tensor workspace;
  if (bias.defined()) workspace = at::empty({kernels::cuda_bias_sums_bytes(shape.rows, shape.cols)}, x.options().dtype(at::kByte));
  const DType bias_dtype = bias.defined() ? to_dtype(bias.scalar_type()) : DType::F32;
  kernels::bias_act_backward(activation, to_dtype(x.scalar_type()), data(grad), data(x), data(bias), bias_dtype, mutable_data(dx),
                             bias.defined() ? mutable_data(dbias) : nullptr, shape.rows, shape.cols, mutable_data(workspace), gpu.stream());
  return {dx, dbias};
}
#endif

template <std::tuple<Tensor, Tensor> (*kRun)(const Tensor&, const Tensor&, const OptionalTensor&, std::string_view, bool)>
std::tuple<Tensor, Tensor> bias_act_backward(const Tensor& grad, const Tensor& x, const OptionalTensor& bias, std::string_view act) {
  return kRun(grad, x, bias, act, false);
}

template <std::tuple<Tensor, Tensor> (*kRun)(const Tensor&, const Tensor&, const OptionalTensor&, std::string_view, bool)>
Tensor bias_act_backward_(Tensor& grad, const Tensor& x, const OptionalTensor& bias, std::string_view act) {
  Tensor dbias = std::get<1>(kRun(grad, x, bias, act, true));
  mark_written(grad);
  return dbias;
}

Tensor bias_act_meta(const Tensor& x, const OptionalTensor& bias, std::string_view act) {
  activation_named(act);
  return at::empty_symint(x.sym_sizes(), x.options());
}

std::tuple<Tensor, Tensor> bias_act_backward_meta(const Tensor& grad, const Tensor& x, const OptionalTensor& bias, std::string_view act) {
  Tensor dbias = bias.has_value() ? at::empty_symint(bias->sym_sizes(), bias->options()) : no_gradient(x);
  return {at::empty_symint(x.sym_sizes(), x.options()), dbias};
}

Tensor bias_act_backward_meta_(Tensor& grad, const Tensor& x, const OptionalTensor& bias, std::string_view act) {
  return bias.has_value() ? at::empty_symint(bias->sym_sizes(), bias->options()) : no_gradient(x);
}

using Forward = Tensor(const Tensor&, const OptionalTensor&, std::string_view);
using Backward = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const OptionalTensor&, std::string_view);
using BackwardInPlace = Tensor(Tensor&, const Tensor&, const OptionalTensor&, std::string_view);

struct BiasAct : torch::autograd::Function<BiasAct> {
  static Tensor forward(torch::autograd::AutogradContext* ctx, const Tensor& x, const OptionalTensor& bias, const std::string& act) {
    at::AutoDispatchBelowADInplaceOrView below;
    static const auto op = find_op<Forward>("deepspeed::bias_act");
    ctx->save_for_backward({x, value_or_undefined(bias)});
    ctx->saved_data["act"] = act;
    return op.call(x, bias, act);
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx, const torch::autograd::variable_list& grads) {
    static const auto op = find_op<Backward>("deepspeed::bias_act_backward");
    static const auto in_place = find_op<BackwardInPlace>("deepspeed::bias_act_backward_");
    const auto saved = ctx->get_saved_variables();
    const bool take = may_take(grads[0], saved[0]);
    const OptionalTensor bias = saved[1].defined() ? OptionalTensor(saved[1]) : std::nullopt;
    const auto& act = ctx->saved_data["act"].toStringRef();
    Tensor dx = grads[0], dbias;
    if (take) dbias = in_place.call(dx, saved[0], bias, act);
    else std::tie(dx, dbias) = op.call(dx, saved[0], bias, act);
    return {dx, bias.has_value() ? dbias : Tensor(), Tensor()};
  }
};

Tensor bias_act_autograd(const Tensor& x, const OptionalTensor& bias, std::string_view act) {
  return BiasAct::apply(x, bias, std::string(act));
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(deepspeed, m) {
  m.def("bias_act(Tensor x, Tensor? bias, str act) -> Tensor", {at::Tag::pt2_compliant_tag});
  m.def("bias_act_backward(Tensor grad, Tensor x, Tensor? bias, str act) -> (Tensor, Tensor)", {at::Tag::pt2_compliant_tag});
  m.def("bias_act_backward_(Tensor(a!) grad, Tensor x, Tensor? bias, str act) -> Tensor", {at::Tag::pt2_compliant_tag});
}
TORCH_LIBRARY_IMPL(deepspeed, CPU, m) {
  m.impl("bias_act", bias_act_cpu);
  m.impl("bias_act_backward", bias_act_backward<backward_cpu>);
  m.impl("bias_act_backward_", bias_act_backward_<backward_cpu>);
}
#ifdef DS_WITH_CUDA
TORCH_LIBRARY_IMPL(deepspeed, CUDA, m) {
  m.impl("bias_act", bias_act_cuda);
  m.impl("bias_act_backward", bias_act_backward<backward_cuda>);
  m.impl("bias_act_backward_", bias_act_backward_<backward_cuda>);
}
#endif
TORCH_LIBRARY_IMPL(deepspeed, Meta, m) {
  implement_meta<bias_act_meta>(m, "bias_act");
  implement_meta<bias_act_backward_meta>(m, "bias_act_backward");
  implement_meta<bias_act_backward_meta_>(m, "bias_act_backward_");
}
TORCH_LIBRARY_IMPL(deepspeed, Autograd, m) {
  implement_autograd<bias_act_autograd>(m, "bias_act");
  m.impl("bias_act_backward", torch::autograd::autogradNotImplementedFallback());
  m.impl("bias_act_backward_", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace ds::ops
