// SPDX-License-Identifier: Apache-2.0
// deepspeed::gated: act(gate) * up of two tensors; deepspeed::gated_halves: the same of the halves [.., gate | up] of one, with a bias. Nothing
// but the inputs is kept for the backward pass, which makes both gradients in one go.
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <string>
#include <tuple>

#include "ops/activation.h"
#include "ops/bias.h"
#include "ops/derivative.h"
#include "ops/register.h"

namespace ds::ops {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Pair = std::tuple<Tensor, Tensor>;

void check_two(const Tensor& gate, const Tensor& up) {
  check_float(gate, "gate");
  check_like(up, "up", gate, "gate");
}

void check_halves(const Tensor& x, const Tensor& bias) {
  check_float(x, "x");
  TORCH_CHECK_VALUE(x.dim() >= 1 && x.size(-1) % 2 == 0, "x: its last dimension must hold two halves, its shape is ", x.sizes());
  if (bias.defined()) check_vector(bias, "bias", x.size(-1), x, "x");
}

// The output's or its gradient's shape.
std::vector<int64_t> half_of(const Tensor& x) {
  std::vector<int64_t> sizes = x.sizes().vec();
  sizes.back() /= 2;
  return sizes;
}

// Pointers into arrays of one dtype, moved on by elements.
class Elements {
 public:
  explicit Elements(const Tensor& t) : unit_(static_cast<int64_t>(t.element_size())) {}
  const void* operator()(const Tensor& t, int64_t i) const { return static_cast<const char*>(t.const_data_ptr()) + i * unit_; }
  void* write(Tensor& t, int64_t i) const { return static_cast<char*>(t.mutable_data_ptr()) + i * unit_; }

 private:
  int64_t unit_;
};

Tensor gated_cpu(const Tensor& gate_in, const Tensor& up_in, std::string_view act) {
  check_two(gate_in, up_in);
  const auto activation = activation_named(act);
  const Tensor gate = gate_in.contiguous(), up = up_in.contiguous();
  Tensor y = at::empty(gate.sizes(), gate.options());
  const Elements at(gate);
  for_chunks(gate.numel(), kChunkElements, [&](int64_t, int64_t begin, int64_t end) {
    kernels::gated(activation, to_dtype(gate.scalar_type()), {at(gate, begin), at(up, begin), 0, nullptr, nullptr}, at.write(y, begin), 1,
                   end - begin);
  });
  return y;
}

// In place: dgate is grad_in.
Pair backward_cpu(const Tensor& grad_in, const Tensor& gate_in, const Tensor& up_in, std::string_view act, bool in_place) {
  check_two(gate_in, up_in);
  check_like(grad_in, "grad", gate_in, "gate");
  const auto activation = activation_named(act);
  const Tensor gate = gate_in.contiguous(), up = up_in.contiguous(), grad = grad_in.contiguous();
  Tensor dgate = in_place ? taken(grad_in, "grad", {gate, up}) : at::empty(gate.sizes(), gate.options());
  Tensor dup = at::empty(gate.sizes(), gate.options());
  const Elements at(gate);
  for_chunks(gate.numel(), kChunkElements, [&](int64_t, int64_t begin, int64_t end) {
    kernels::gated_backward(activation, to_dtype(gate.scalar_type()), {at(gate, begin), at(up, begin), 0, nullptr, nullptr}, at(grad, begin),
                            {at.write(dgate, begin), at.write(dup, begin), 0, nullptr, nullptr}, 1, end - begin);
  });
  return {dgate, dup};
}

Tensor gated_halves_cpu(const Tensor& x_in, const OptionalTensor& bias_in, std::string_view act) {
  const Tensor bias = value_or_undefined(bias_in);
  check_halves(x_in, bias);
  const auto activation = activation_named(act);
  const Tensor x = x_in.contiguous();
  Tensor y = at::empty(half_of(x), x.options());
  const Rows shape = rows_of(x, bias, 2);
  const at::Tensor b = float_vector(bias);
  const float* up_bias = bias.defined() ? floats(b) + shape.cols : nullptr;
  const Elements at(x);
  for_chunks(shape.rows, rows_in_chunk(shape.cols), [&](int64_t, int64_t begin, int64_t end) {
    const int64_t row = 2 * shape.cols * begin;
    kernels::gated(activation, to_dtype(x.scalar_type()), {at(x, row), at(x, row + shape.cols), 2 * shape.cols, floats(b), up_bias},
                   at.write(y, begin * shape.cols), end - begin, shape.cols);
  });
  return y;
}

Pair gated_halves_backward_cpu(const Tensor& grad_in, const Tensor& x_in, const OptionalTensor& bias_in, std::string_view act) {
  const Tensor bias = value_or_undefined(bias_in);
  check_halves(x_in, bias);
  check_float(grad_in, "grad");
  check_device(grad_in, "grad", x_in, "x");
  check_dtype(grad_in, "grad", x_in, "x");
  check_shape(grad_in, "grad", half_of(x_in));
  const auto activation = activation_named(act);
  const Tensor x = x_in.contiguous(), grad = grad_in.contiguous();
  Tensor dx = at::empty(x.sizes(), x.options());
  const Rows shape = rows_of(x, bias, 2);
  const at::Tensor b = float_vector(bias);
  const float* up_bias = bias.defined() ? floats(b) + shape.cols : nullptr;
  const Elements at(x);
  ColumnSums sums(bias.defined() ? shape.rows : 0, 2 * shape.cols);
  const int64_t chunk = bias.defined() ? sums.chunk() : rows_in_chunk(shape.cols);
  for_chunks(shape.rows, chunk, [&](int64_t index, int64_t begin, int64_t end) {
    const int64_t row = 2 * shape.cols * begin;
    float* part = bias.defined() ? sums.part(index) : nullptr;
    kernels::gated_backward(activation, to_dtype(x.scalar_type()), {at(x, row), at(x, row + shape.cols), 2 * shape.cols, floats(b), up_bias},
                            at(grad, begin * shape.cols),
                            {at.write(dx, row), at.write(dx, row + shape.cols), 2 * shape.cols, part, part ? part + shape.cols : nullptr},
                            end - begin, shape.cols);
  });
  return {dx, bias.defined() ? sums.join(bias) : no_gradient(x)};
}

#ifdef DS_WITH_CUDA
Tensor gated_cuda(const Tensor& gate_in, const Tensor& up_in, std::string_view act) {
  check_two(gate_in, up_in);
  const auto activation = activation_named(act);
  const OnGpu gpu(gate_in);
  const Tensor gate = gate_in.contiguous(), up = up_in.contiguous();
  Tensor y = at::empty(gate.sizes(), gate.options());
  kernels::gated(activation, to_dtype(gate.scalar_type()), {data(gate), data(up), gate.numel(), nullptr, DType::F32}, mutable_data(y), 1,
                 gate.numel(), gpu.stream());
  return y;
}

Pair backward_cuda(const Tensor& grad_in, const Tensor& gate_in, const Tensor& up_in, std::string_view act, bool in_place) {
  check_two(gate_in, up_in);
  check_like(grad_in, "grad", gate_in, "gate");
  const auto activation = activation_named(act);
  const OnGpu gpu(gate_in);
  const Tensor gate = gate_in.contiguous(), up = up_in.contiguous(), grad = grad_in.contiguous();
  Tensor dgate = in_place ? taken(grad_in, "grad", {gate, up}) : at::empty(gate.sizes(), gate.options());
  Tensor dup = at::empty(gate.sizes(), gate.options());
  kernels::gated_backward(activation, to_dtype(gate.scalar_type()), {data(gate), data(up), gate.numel(), nullptr, DType::F32}, data(grad),
                          mutable_data(dgate), mutable_data(dup), gate.numel(), nullptr, 1, gate.numel(), nullptr, gpu.stream());
  return {dgate, dup};
}

kernels::CudaGatedInput halves_of(const Tensor& x, const Tensor& bias, const Rows& shape) {
  const DType bias_dtype = bias.defined() ? to_dtype(bias.scalar_type()) : DType::F32;
  return {data(x), Elements(x)(x, shape.cols), 2 * shape.cols, data(bias), bias_dtype};
}

Tensor gated_halves_cuda(const Tensor& x_in, const OptionalTensor& bias_in, std::string_view act) {
  const Tensor bias_any = value_or_undefined(bias_in);
  check_halves(x_in, bias_any);
  const auto activation = activation_named(act);
  const OnGpu gpu(x_in);
  const Tensor x = x_in.contiguous(), bias = bias_any.defined() ? bias_any.contiguous() : bias_any;
  Tensor y = at::empty(half_of(x), x.options());
  const Rows shape = rows_of(x, bias, 2);
  kernels::gated(activation, to_dtype(x.scalar_type()), halves_of(x, bias, shape), mutable_data(y), shape.rows, shape.cols, gpu.stream());
  return y;
}

Pair gated_halves_backward_cuda(const Tensor& grad_in, const Tensor& x_in, const OptionalTensor& bias_in, std::string_view act) {
  const Tensor bias_any = value_or_undefined(bias_in);
  check_halves(x_in, bias_any);
  check_float(grad_in, "grad");
  check_device(grad_in, "grad", x_in, "x");
  check_dtype(grad_in, "grad", x_in, "x");
  check_shape(grad_in, "grad", half_of(x_in));
  const auto activation = activation_named(act);
  const OnGpu gpu(x_in);
  const Tensor x = x_in.contiguous(), grad = grad_in.contiguous(), bias = bias_any.defined() ? bias_any.contiguous() : bias_any;
  Tensor dx = at::empty(x.sizes(), x.options());
  const Rows shape = rows_of(x, bias, 2);
  Tensor dbias = bias.defined() ? at::empty(bias.sizes(), bias.options()) : no_gradient(x);
  Tensor workspace;
  if (bias.defined()) workspace = at::empty({kernels::cuda_bias_sums_bytes(shape.rows, 2 * shape.cols)}, x.options().dtype(at::kByte));
  kernels::gated_backward(activation, to_dtype(x.scalar_type()), halves_of(x, bias, shape), data(grad), mutable_data(dx),
                          Elements(dx).write(dx, shape.cols), 2 * shape.cols, bias.defined() ? mutable_data(dbias) : nullptr, shape.rows,
                          shape.cols, mutable_data(workspace), gpu.stream());
  return {dx, dbias};
}
#endif

template <Pair (*kRun)(const Tensor&, const Tensor&, const Tensor&, std::string_view, bool)>
Pair gated_backward(const Tensor& grad, const Tensor& gate, const Tensor& up, std::string_view act) {
  return kRun(grad, gate, up, act, false);
}

template <Pair (*kRun)(const Tensor&, const Tensor&, const Tensor&, std::string_view, bool)>
Tensor gated_backward_(Tensor& grad, const Tensor& gate, const Tensor& up, std::string_view act) {
  Tensor dup = std::get<1>(kRun(grad, gate, up, act, true));
  mark_written(grad);
  return dup;
}

Tensor gated_meta(const Tensor& gate, const Tensor& up, std::string_view act) {
  activation_named(act);
  return at::empty_symint(gate.sym_sizes(), gate.options());
}

Pair gated_backward_meta(const Tensor& grad, const Tensor& gate, const Tensor& up, std::string_view act) {
  return {at::empty_symint(gate.sym_sizes(), gate.options()), at::empty_symint(gate.sym_sizes(), gate.options())};
}

Tensor gated_backward_meta_(Tensor& grad, const Tensor& gate, const Tensor& up, std::string_view act) {
  return at::empty_symint(gate.sym_sizes(), gate.options());
}

Tensor gated_halves_meta(const Tensor& x, const OptionalTensor& bias, std::string_view act) {
  activation_named(act);
  TORCH_CHECK_VALUE(x.dim() >= 1 && x.sym_size(-1) % 2 == 0, "x: its last dimension must hold two halves, its shape is ", x.sym_sizes());
  std::vector<c10::SymInt> sizes = x.sym_sizes().vec();
  sizes.back() = sizes.back() / 2;
  return at::empty_symint(sizes, x.options());
}

Pair gated_halves_backward_meta(const Tensor& grad, const Tensor& x, const OptionalTensor& bias, std::string_view act) {
  Tensor dbias = bias.has_value() ? at::empty_symint(bias->sym_sizes(), bias->options()) : no_gradient(x);
  return {at::empty_symint(x.sym_sizes(), x.options()), dbias};
}

using Forward = Tensor(const Tensor&, const Tensor&, std::string_view);
using Backward = Pair(const Tensor&, const Tensor&, const Tensor&, std::string_view);
using BackwardInPlace = Tensor(Tensor&, const Tensor&, const Tensor&, std::string_view);
using HalvesForward = Tensor(const Tensor&, const OptionalTensor&, std::string_view);
using HalvesBackward = Pair(const Tensor&, const Tensor&, const OptionalTensor&, std::string_view);
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct GatedFunction : torch::autograd::Function<GatedFunction> {
  static Tensor forward(AutogradContext* ctx, const Tensor& gate, const Tensor& up, const std::string& act) {
    at::AutoDispatchBelowADInplaceOrView below;
    static const auto op = find_op<Forward>("deepspeed::gated");
    ctx->save_for_backward({gate, up});
    ctx->saved_data["act"] = act;
    return op.call(gate, up, act);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto op = find_op<Backward>("deepspeed::gated_backward");
    static const auto in_place = find_op<BackwardInPlace>("deepspeed::gated_backward_");
    const auto saved = ctx->get_saved_variables();
    const bool take = may_take(grads[0], saved[0]);
    const auto& act = ctx->saved_data["act"].toStringRef();
    Tensor dgate = grads[0], dup;
    if (take) dup = in_place.call(dgate, saved[0], saved[1], act);
    else std::tie(dgate, dup) = op.call(dgate, saved[0], saved[1], act);
    return {dgate, dup, Tensor()};
  }
};

struct GatedHalvesFunction : torch::autograd::Function<GatedHalvesFunction> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const OptionalTensor& bias, const std::string& act) {
    at::AutoDispatchBelowADInplaceOrView below;
    static const auto op = find_op<HalvesForward>("deepspeed::gated_halves");
    ctx->save_for_backward({x, value_or_undefined(bias)});
    ctx->saved_data["act"] = act;
    return op.call(x, bias, act);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto op = find_op<HalvesBackward>("deepspeed::gated_halves_backward");
    const auto saved = ctx->get_saved_variables();
    const bool has_bias = saved[1].defined();
    const auto [dx, dbias] = op.call(grads[0], saved[0], has_bias ? OptionalTensor(saved[1]) : std::nullopt,
                                     ctx->saved_data["act"].toStringRef());
    return {dx, has_bias ? dbias : Tensor(), Tensor()};
  }
};

Tensor gated_autograd(const Tensor& gate, const Tensor& up, std::string_view act) { return GatedFunction::apply(gate, up, std::string(act)); }
Tensor gated_halves_autograd(const Tensor& x, const OptionalTensor& bias, std::string_view act) {
  return GatedHalvesFunction::apply(x, bias, std::string(act));
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(deepspeed, m) {
  m.def("gated(Tensor gate, Tensor up, str act) -> Tensor", {at::Tag::pt2_compliant_tag});
  m.def("gated_backward(Tensor grad, Tensor gate, Tensor up, str act) -> (Tensor, Tensor)", {at::Tag::pt2_compliant_tag});
  m.def("gated_backward_(Tensor(a!) grad, Tensor gate, Tensor up, str act) -> Tensor", {at::Tag::pt2_compliant_tag});
  m.def("gated_halves(Tensor x, Tensor? bias, str act) -> Tensor", {at::Tag::pt2_compliant_tag});
  m.def("gated_halves_backward(Tensor grad, Tensor x, Tensor? bias, str act) -> (Tensor, Tensor)", {at::Tag::pt2_compliant_tag});
}
TORCH_LIBRARY_IMPL(deepspeed, CPU, m) {
  m.impl("gated", gated_cpu);
  m.impl("gated_backward", gated_backward<backward_cpu>);
  m.impl("gated_backward_", gated_backward_<backward_cpu>);
  m.impl("gated_halves", gated_halves_cpu);
  m.impl("gated_halves_backward", gated_halves_backward_cpu);
}
#ifdef DS_WITH_CUDA
TORCH_LIBRARY_IMPL(deepspeed, CUDA, m) {
  m.impl("gated", gated_cuda);
  m.impl("gated_backward", gated_backward<backward_cuda>);
  m.impl("gated_backward_", gated_backward_<backward_cuda>);
  m.impl("gated_halves", gated_halves_cuda);
  m.impl("gated_halves_backward", gated_halves_backward_cuda);
}
#endif
TORCH_LIBRARY_IMPL(deepspeed, Meta, m) {
  implement_meta<gated_meta>(m, "gated");
  implement_meta<gated_backward_meta>(m, "gated_backward");
  implement_meta<gated_backward_meta_>(m, "gated_backward_");
  implement_meta<gated_halves_meta>(m, "gated_halves");
  implement_meta<gated_halves_backward_meta>(m, "gated_halves_backward");
}
TORCH_LIBRARY_IMPL(deepspeed, Autograd, m) {
  implement_autograd<gated_autograd>(m, "gated");
  implement_autograd<gated_halves_autograd>(m, "gated_halves");
  m.impl("gated_backward", torch::autograd::autogradNotImplementedFallback());
  m.impl("gated_backward_", torch::autograd::autogradNotImplementedFallback());
  m.impl("gated_halves_backward", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace ds::ops
