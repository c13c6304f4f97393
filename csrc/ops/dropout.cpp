// SPDX-License-Identifier: Apache-2.0
// deepspeed::dropout_add: residual + dropout(x + bias), the mask made from (seed, offset) in both directions. deepspeed::philox_state draws
// that pair from torch's generator of the device, so that torch.manual_seed repeats it and a recomputed forward pass drops the same elements.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <mutex>
#include <tuple>

#include "kernels/activation/activation.h"
#include "kernels/dropout/dropout.h"
#include "ops/bias.h"
#include "ops/derivative.h"
#include "ops/fresh.h"
#include "ops/register.h"

#ifdef DS_WITH_CUDA
#include <ATen/cuda/CUDAGeneratorImpl.h>
#endif

namespace ds::ops {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Two = std::tuple<Tensor, Tensor>;

void check_state(const Tensor& state, const Tensor& x, const char* x_name) {
  check_device(state, "state", x, x_name);
  TORCH_CHECK_VALUE(state.scalar_type() == at::kLong && state.dim() == 1 && state.size(0) == 2 && state.is_contiguous(),
                    "state must be two int64, the seed and the offset");
}

void check_p(double p) { TORCH_CHECK_VALUE(p >= 0.0 && p <= 1.0, "p must lie in [0, 1], got ", p); }

void check(const Tensor& x, const Tensor& residual, const Tensor& bias, double p, const Tensor& state) {
  check_float(x, "x");
  check_like(residual, "residual", x, "x");
  if (bias.defined()) {
    TORCH_CHECK_VALUE(x.dim() >= 1, "x must have a dimension for the bias");
    check_vector(bias, "bias", x.size(-1), x, "x");
  }
  check_p(p);
  check_state(state, x, "x");
}

void check_backward(const Tensor& grad, const Tensor& bias, double p, const Tensor& state) {
  check_float(grad, "grad");
  if (bias.defined()) {
    TORCH_CHECK_VALUE(grad.dim() >= 1, "grad must have a dimension for the bias");
    check_vector(bias, "bias", grad.size(-1), grad, "grad");
  }
  check_p(p);
  check_state(state, grad, "grad");
}

kernels::Dropout dropout_of(double p, const Tensor& state) {
  const auto* pair = static_cast<const int64_t*>(state.const_data_ptr());
  return {p, static_cast<uint64_t>(pair[0]), static_cast<uint64_t>(pair[1])};
}

Tensor philox_state_cpu(const Tensor& like) {
  const at::Generator generator = at::detail::getDefaultCPUGenerator();
  auto* cpu = at::check_generator<at::CPUGeneratorImpl>(generator);
  Tensor state = at::empty({2}, like.options().dtype(at::kLong));
  auto* pair = static_cast<int64_t*>(state.mutable_data_ptr());
  const std::lock_guard<std::mutex> lock(cpu->mutex_);
  pair[0] = static_cast<int64_t>(cpu->random64());
  pair[1] = 0;
  return state;
}

Tensor dropout_add_cpu(const Tensor& x_in, const Tensor& residual_in, const OptionalTensor& bias_in, double p, const Tensor& state) {
  const Tensor bias = value_or_undefined(bias_in);
  check(x_in, residual_in, bias, p, state);
  const Tensor x = x_in.contiguous(), residual = residual_in.contiguous();
  Tensor y = at::empty(x.sizes(), x.options());
  const at::Tensor b = float_vector(bias);
  const DType dtype = to_dtype(x.scalar_type());
  const auto dropout = dropout_of(p, state);
  const auto *from = static_cast<const char*>(x.const_data_ptr()), *rest = static_cast<const char*>(residual.const_data_ptr());
  auto* to = static_cast<char*>(y.mutable_data_ptr());
  const int64_t unit = static_cast<int64_t>(x.element_size());
  // Without a bias a row is one element, so that the chunks need not end where rows do.
  const Rows shape = bias.defined() ? rows_of(x, bias) : Rows{x.numel(), 1};
  for_chunks(shape.rows, rows_in_chunk(shape.cols), [&](int64_t, int64_t begin, int64_t end) {
    const int64_t at = begin * shape.cols * unit;
    kernels::dropout_add(dtype, from + at, floats(b), rest + at, to + at, dropout, begin, end - begin, shape.cols);
  });
  return y;
}

Two dropout_add_backward_cpu(const Tensor& grad_in, const OptionalTensor& bias_in, double p, const Tensor& state) {
  const Tensor bias = value_or_undefined(bias_in);
  check_backward(grad_in, bias, p, state);
  const Tensor grad = grad_in.contiguous();
  Tensor dx = at::empty(grad.sizes(), grad.options());
  const bool past_caches = is_past_caches(dx);
  const DType dtype = to_dtype(grad.scalar_type());
  const auto dropout = dropout_of(p, state);
  const auto* from = static_cast<const char*>(grad.const_data_ptr());
  auto* to = static_cast<char*>(dx.mutable_data_ptr());
  const int64_t unit = static_cast<int64_t>(grad.element_size());
  const Rows shape = bias.defined() ? rows_of(grad, bias) : Rows{grad.numel(), 1};
  ColumnSums sums(bias.defined() ? shape.rows : 0, shape.cols);
  const int64_t chunk = bias.defined() ? sums.chunk() : rows_in_chunk(shape.cols);
  for_chunks(shape.rows, chunk, [&](int64_t index, int64_t begin, int64_t end) {
    const int64_t at = begin * shape.cols * unit;
    float* part = bias.defined() ? sums.part(index) : nullptr;
    kernels::dropout_add_backward(dtype, from + at, {to + at, past_caches}, part, dropout, begin, end - begin, shape.cols);
  });
  return {dx, bias.defined() ? sums.join(bias) : no_gradient(grad)};
}

#ifdef DS_WITH_CUDA
Tensor philox_state_cuda(const Tensor& like) {
  const OnGpu gpu(like);
  auto* generator = at::check_generator<at::CUDAGeneratorImpl>(at::cuda::detail::getDefaultCUDAGenerator(like.device().index()));
  at::PhiloxCudaState drawn;
  {
    const std::lock_guard<std::mutex> lock(generator->mutex_);
    drawn = generator->philox_cuda_state(4);
  }
  Tensor state = at::empty({2}, like.options().dtype(at::kLong));
  auto* out = static_cast<int64_t*>(state.mutable_data_ptr());
  if (drawn.captured_) {
    kernels::write_philox_state(out, 0, drawn.offset_intragraph_, drawn.seed_.ptr, drawn.offset_.ptr, gpu.stream());
  } else {
    kernels::write_philox_state(out, drawn.seed_.val, drawn.offset_.val, nullptr, nullptr, gpu.stream());
  }
  return state;
}

Tensor dropout_add_cuda(const Tensor& x_in, const Tensor& residual_in, const OptionalTensor& bias_in, double p, const Tensor& state) {
  const Tensor bias_any = value_or_undefined(bias_in);
  check(x_in, residual_in, bias_any, p, state);
  const OnGpu gpu(x_in);
  const Tensor x = x_in.contiguous(), residual = residual_in.contiguous(), bias = bias_any.defined() ? bias_any.contiguous() : bias_any;
  Tensor y = at::empty(x.sizes(), x.options());
  const Rows shape = rows_of(x, bias);
  const DType bias_dtype = bias.defined() ? to_dtype(bias.scalar_type()) : DType::F32;
  kernels::dropout_add(to_dtype(x.scalar_type()), data(x), data(bias), bias_dtype, data(residual), mutable_data(y), p,
                       static_cast<const int64_t*>(data(state)), shape.rows, shape.cols, gpu.stream());
  return y;
}

Two dropout_add_backward_cuda(const Tensor& grad_in, const OptionalTensor& bias_in, double p, const Tensor& state) {
  const Tensor bias = value_or_undefined(bias_in);
  check_backward(grad_in, bias, p, state);
  const OnGpu gpu(grad_in);
  const Tensor grad = grad_in.contiguous();
  Tensor dx = at::empty(grad.sizes(), grad.options());
  const Rows shape = rows_of(grad, bias);
  Tensor dbias = bias.defined() ? at::empty(bias.sizes(), bias.options()) : no_gradient(grad);
  Tensor workspace;
  if (bias.defined()) workspace = at::empty({kernels::cuda_bias_sums_bytes(shape.rows, shape.cols)}, grad.options().dtype(at::kByte));
  kernels::dropout_add_backward(to_dtype(grad.scalar_type()), data(grad), mutable_data(dx), bias.defined() ? mutable_data(dbias) : nullptr,
                                bias.defined() ? to_dtype(bias.scalar_type()) : DType::F32, p, static_cast<const int64_t*>(data(state)),
                                shape.rows, shape.cols, mutable_data(workspace), gpu.stream());
  return {dx, dbias};
}
#endif

Tensor philox_state_meta(const Tensor& like) { return at::empty({2}, like.options().dtype(at::kLong)); }

Tensor dropout_add_meta(const Tensor& x, const Tensor& residual, const OptionalTensor& bias, double p, const Tensor& state) {
  check_p(p);
  return at::empty_symint(x.sym_sizes(), x.options());
}

Two dropout_add_backward_meta(const Tensor& grad, const OptionalTensor& bias, double p, const Tensor& state) {
  Tensor dbias = bias.has_value() ? at::empty_symint(bias->sym_sizes(), bias->options()) : no_gradient(grad);
  return {at::empty_symint(grad.sym_sizes(), grad.options()), dbias};
}

using Forward = Tensor(const Tensor&, const Tensor&, const OptionalTensor&, double, const Tensor&);
using Backward = Two(const Tensor&, const OptionalTensor&, double, const Tensor&);

struct DropoutAdd : torch::autograd::Function<DropoutAdd> {
  static Tensor forward(torch::autograd::AutogradContext* ctx, const Tensor& x, const Tensor& residual, const OptionalTensor& bias, double p,
                        const Tensor& state) {
    at::AutoDispatchBelowADInplaceOrView below;
    static const auto op = find_op<Forward>("deepspeed::dropout_add");
    ctx->save_for_backward({value_or_undefined(bias), state});
    ctx->saved_data["p"] = p;
    return op.call(x, residual, bias, p, state);
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx, torch::autograd::variable_list grads) {
    static const auto op = find_op<Backward>("deepspeed::dropout_add_backward");
    const auto saved = ctx->get_saved_variables();
    const bool has_bias = saved[0].defined();
    const auto [dx, dbias] =
        op.call(grads[0], has_bias ? OptionalTensor(saved[0]) : std::nullopt, ctx->saved_data["p"].toDouble(), saved[1]);
    return {dx, grads[0], has_bias ? dbias : Tensor(), Tensor(), Tensor()};
  }
};

Tensor dropout_add_autograd(const Tensor& x, const Tensor& residual, const OptionalTensor& bias, double p, const Tensor& state) {
  return DropoutAdd::apply(x, residual, bias, p, state);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(deepspeed, m) {
  m.def("philox_state(Tensor like) -> Tensor", {at::Tag::pt2_compliant_tag, at::Tag::nondeterministic_seeded});
  m.def("dropout_add(Tensor x, Tensor residual, Tensor? bias, float p, Tensor state) -> Tensor", {at::Tag::pt2_compliant_tag});
  m.def("dropout_add_backward(Tensor grad, Tensor? bias, float p, Tensor state) -> (Tensor, Tensor)", {at::Tag::pt2_compliant_tag});
}
TORCH_LIBRARY_IMPL(deepspeed, CPU, m) {
  m.impl("philox_state", philox_state_cpu);
  m.impl("dropout_add", dropout_add_cpu);
  m.impl("dropout_add_backward", dropout_add_backward_cpu);
}
#ifdef DS_WITH_CUDA
TORCH_LIBRARY_IMPL(deepspeed, CUDA, m) {
  m.impl("philox_state", philox_state_cuda);
  m.impl("dropout_add", dropout_add_cuda);
  m.impl("dropout_add_backward", dropout_add_backward_cuda);
}
#endif
TORCH_LIBRARY_IMPL(deepspeed, Meta, m) {
  implement_meta<philox_state_meta>(m, "philox_state");
  implement_meta<dropout_add_meta>(m, "dropout_add");
  implement_meta<dropout_add_backward_meta>(m, "dropout_add_backward");
}
TORCH_LIBRARY_IMPL(deepspeed, Autograd, m) {
  implement_autograd<dropout_add_autograd>(m, "dropout_add");
  m.impl("dropout_add_backward", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace ds::ops
