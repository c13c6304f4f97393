// SPDX-License-Identifier: Apache-2.0
// The norms' schemas, what each device runs, the sizes that torch.compile needs, and their derivatives.
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "ops/arguments.h"
#include "ops/derivative.h"
#include "ops/norm.h"
#include "ops/register.h"

namespace ds::ops {
namespace {

using at::Tensor;
using kernels::Norm;
using Maybe = std::optional<Tensor>;
using Dtype = std::optional<at::ScalarType>;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Two = std::tuple<Tensor, Tensor>;
using Three = std::tuple<Tensor, Tensor, Tensor>;
using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// What a device provides.
using Forward = Normed (*)(const NormInputs&);
using Backward = Three (*)(const NormGradInputs&);

// ---- a device's operators ------------------------------------------------------------------------------------------

template <Forward kForward>
Three layer_norm(const Tensor& x, const Maybe& weight, const Maybe& bias, double eps) {
  const Normed out = kForward({Norm::Layer, x, Tensor(), value_or_undefined(weight), value_or_undefined(bias), eps, 0.0});
  return {out.y, out.mean, out.rstd};
}

template <Forward kForward>
Four layer_norm_residual(const Tensor& x, const Tensor& residual, const Maybe& weight, const Maybe& bias, double eps) {
  const Normed out = kForward({Norm::Layer, x, residual, value_or_undefined(weight), value_or_undefined(bias), eps, 0.0});
  return {out.y, out.h, out.mean, out.rstd};
}

template <Forward kForward>
Two rms_norm(const Tensor& x, const Maybe& weight, double eps, double weight_offset) {
  const Normed out = kForward({Norm::Rms, x, Tensor(), value_or_undefined(weight), Tensor(), eps, weight_offset});
  return {out.y, out.rstd};
}

template <Forward kForward>
Three rms_norm_residual(const Tensor& x, const Tensor& residual, const Maybe& weight, double eps, double weight_offset) {
  const Normed out = kForward({Norm::Rms, x, residual, value_or_undefined(weight), Tensor(), eps, weight_offset});
  return {out.y, out.h, out.rstd};
}

template <Backward kBackward>
Three layer_norm_backward(const Tensor& dy, const Maybe& dh, const Tensor& h, const Maybe& weight, const Tensor& mean, const Tensor& rstd,
                          Dtype parameter_dtype) {
  return kBackward({Norm::Layer, dy, value_or_undefined(dh), h, value_or_undefined(weight), mean, rstd, 0.0, parameter_dtype});
}

template <Backward kBackward>
Two rms_norm_backward(const Tensor& dy, const Maybe& dh, const Tensor& h, const Maybe& weight, const Tensor& rstd, double weight_offset,
                      Dtype parameter_dtype) {
  const Three all = kBackward({Norm::Rms, dy, value_or_undefined(dh), h, value_or_undefined(weight), Tensor(), rstd, weight_offset,
                               parameter_dtype});
  return {std::get<0>(all), std::get<1>(all)};
}

// dx takes the memory of dy.
template <Backward kBackward>
Two layer_norm_backward_(Tensor& dy, const Maybe& dh, const Tensor& h, const Maybe& weight, const Tensor& mean, const Tensor& rstd,
                         Dtype parameter_dtype) {
  const Three all =
      kBackward({Norm::Layer, dy, value_or_undefined(dh), h, value_or_undefined(weight), mean, rstd, 0.0, parameter_dtype, true});
  mark_written(dy);
  return {std::get<1>(all), std::get<2>(all)};
}

template <Backward kBackward>
Tensor rms_norm_backward_(Tensor& dy, const Maybe& dh, const Tensor& h, const Maybe& weight, const Tensor& rstd, double weight_offset,
                          Dtype parameter_dtype) {
  const Three all = kBackward({Norm::Rms, dy, value_or_undefined(dh), h, value_or_undefined(weight), Tensor(), rstd, weight_offset,
                               parameter_dtype, true});
  mark_written(dy);
  return std::get<1>(all);
}

// ---- sizes ---------------------------------------------------------------------------------------------------------

Normed norm_forward_meta(const NormInputs& in) {
  check_float(in.x, "x");
  TORCH_CHECK_VALUE(in.x.dim() >= 1, "x must have at least one dimension");
  const auto sizes = in.x.sym_sizes();
  const auto like_x = [&] { return at::empty_symint(sizes, in.x.options()); };
  const auto statistic = [&] { return at::empty_symint(sizes.slice(0, sizes.size() - 1), in.x.options().dtype(at::kFloat)); };
  return {like_x(), in.residual.defined() ? like_x() : Tensor(), in.norm == Norm::Layer ? statistic() : Tensor(), statistic()};
}

Three norm_backward_meta(const NormGradInputs& in) {
  check_float(in.h, "h");
  TORCH_CHECK_VALUE(in.h.dim() >= 1, "h must have at least one dimension");
  const auto sizes = in.h.sym_sizes();
  const auto options = in.h.options().dtype(in.parameter_dtype.value_or(at::kFloat));
  const auto parameter = [&] { return at::empty_symint({in.parameter_dtype.has_value() ? sizes.back() : c10::SymInt(0)}, options); };
  return {at::empty_symint(sizes, in.h.options()), parameter(), in.norm == Norm::Layer ? parameter() : Tensor()};
}

// ---- derivatives ---------------------------------------------------------------------------------------------------

using LayerNorm = Three(const Tensor&, const Maybe&, const Maybe&, double);
using LayerNormResidual = Four(const Tensor&, const Tensor&, const Maybe&, const Maybe&, double);
using LayerNormBackward = Three(const Tensor&, const Maybe&, const Tensor&, const Maybe&, const Tensor&, const Tensor&, Dtype);
using RmsNorm = Two(const Tensor&, const Maybe&, double, double);
using RmsNormResidual = Three(const Tensor&, const Tensor&, const Maybe&, double, double);
using RmsNormBackward = Two(const Tensor&, const Maybe&, const Tensor&, const Maybe&, const Tensor&, double, Dtype);
using LayerNormBackwardInPlace = Two(Tensor&, const Maybe&, const Tensor&, const Maybe&, const Tensor&, const Tensor&, Dtype);
using RmsNormBackwardInPlace = Tensor(Tensor&, const Maybe&, const Tensor&, const Maybe&, const Tensor&, double, Dtype);

Normed call_forward(const Tensor& x, const Maybe& residual, const Maybe& weight, const Maybe& bias, Norm norm, double eps, double offset) {
  static const auto layer = find_op<LayerNorm>("deepspeed::layer_norm");
  static const auto layer_residual = find_op<LayerNormResidual>("deepspeed::layer_norm_residual");
  static const auto rms = find_op<RmsNorm>("deepspeed::rms_norm");
  static const auto rms_residual = find_op<RmsNormResidual>("deepspeed::rms_norm_residual");
  Normed out;
  if (norm == Norm::Layer && residual.has_value()) {
    std::tie(out.y, out.h, out.mean, out.rstd) = layer_residual.call(x, *residual, weight, bias, eps);
  } else if (norm == Norm::Layer) {
    std::tie(out.y, out.mean, out.rstd) = layer.call(x, weight, bias, eps);
  } else if (residual.has_value()) {
    std::tie(out.y, out.h, out.rstd) = rms_residual.call(x, *residual, weight, eps, offset);
  } else {
    std::tie(out.y, out.rstd) = rms.call(x, weight, eps, offset);
  }
  return out;
}

Three call_backward(const NormGradInputs& in) {
  static const auto layer = find_op<LayerNormBackward>("deepspeed::layer_norm_backward");
  static const auto layer_ = find_op<LayerNormBackwardInPlace>("deepspeed::layer_norm_backward_");
  static const auto rms = find_op<RmsNormBackward>("deepspeed::rms_norm_backward");
  static const auto rms_ = find_op<RmsNormBackwardInPlace>("deepspeed::rms_norm_backward_");
  const auto maybe = [](const Tensor& t) { return t.defined() ? Maybe(t) : std::nullopt; };
  const Maybe dh = maybe(in.dh), weight = maybe(in.weight);
  Tensor dx = in.dy, dweight, dbias;
  if (in.norm == Norm::Layer) {
    if (in.in_place) std::tie(dweight, dbias) = layer_.call(dx, dh, in.h, weight, in.mean, in.rstd, in.parameter_dtype);
    else std::tie(dx, dweight, dbias) = layer.call(dx, dh, in.h, weight, in.mean, in.rstd, in.parameter_dtype);
  } else {
    if (in.in_place) dweight = rms_.call(dx, dh, in.h, weight, in.rstd, in.weight_offset, in.parameter_dtype);
    else std::tie(dx, dweight) = rms.call(dx, dh, in.h, weight, in.rstd, in.weight_offset, in.parameter_dtype);
  }
  return {dx, dweight, dbias};
}

// Saves what was normalised (without a residual that is x, which costs nothing) and two floats a row.
struct NormFunction : torch::autograd::Function<NormFunction> {
  static constexpr int kArguments = 7;

  // Outputs y, h (with a residual), mean (of layer norm), rstd.
  static variable_list forward(AutogradContext* context, const Tensor& x, const Maybe& residual, const Maybe& weight, const Maybe& bias,
                               bool layer, double eps, double offset) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const Normed out = call_forward(x, residual, weight, bias, layer ? Norm::Layer : Norm::Rms, eps, offset);
    const auto trains = [](const Maybe& t) { return t.has_value() && t->defined() && t->requires_grad(); };
    context->set_materialize_grads(false);
    context->save_for_backward({out.h.defined() ? out.h : x, value_or_undefined(weight), out.mean, out.rstd});
    context->saved_data["layer"] = layer;
    context->saved_data["residual"] = out.h.defined();
    context->saved_data["offset"] = offset;
    context->saved_data["weight_trains"] = trains(weight);
    context->saved_data["bias_trains"] = trains(bias);
    for (const Maybe* t : {&weight, &bias}) {  // they share a dtype
      if (trains(*t)) context->saved_data["dtype"] = static_cast<int64_t>((*t)->scalar_type());
    }
    variable_list outputs, statistics;
    outputs.push_back(out.y);
    if (out.h.defined()) outputs.push_back(out.h);
    for (const Tensor& t : {out.mean, out.rstd}) {
      if (t.defined()) statistics.push_back(t);
    }
    outputs.insert(outputs.end(), statistics.begin(), statistics.end());
    context->mark_non_differentiable(statistics);
    return outputs;
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    auto& saved = context->saved_data;
    const variable_list tensors = context->get_saved_variables();
    const bool has_residual = saved["residual"].toBool();
    const Tensor& dy = grads[0];
    const Tensor dh = has_residual ? grads[1] : Tensor();
    variable_list result(kArguments);
    if (!dy.defined()) {  // only h was used
      result[0] = dh;
      if (has_residual) result[1] = dh;
      return result;
    }
    const bool weight_trains = saved["weight_trains"].toBool(), bias_trains = saved["bias_trains"].toBool();
    Dtype dtype;
    if (weight_trains || bias_trains) dtype = static_cast<at::ScalarType>(saved["dtype"].toInt());
    const Norm norm = saved["layer"].toBool() ? Norm::Layer : Norm::Rms;
    const bool in_place = may_take(dy, tensors[0]);  // before dy is copied
    const Three all =
        call_backward({norm, dy, dh, tensors[0], tensors[1], tensors[2], tensors[3], saved["offset"].toDouble(), dtype, in_place});
    result[0] = std::get<0>(all);
    if (has_residual) result[1] = std::get<0>(all);
    if (weight_trains) result[2] = std::get<1>(all);
    if (bias_trains) result[3] = std::get<2>(all);
    return result;
  }
};

Three layer_norm_autograd(const Tensor& x, const Maybe& weight, const Maybe& bias, double eps) {
  const variable_list out = NormFunction::apply(x, Maybe(), weight, bias, true, eps, 0.0);
  return {out[0], out[1], out[2]};
}

Four layer_norm_residual_autograd(const Tensor& x, const Tensor& residual, const Maybe& weight, const Maybe& bias, double eps) {
  const variable_list out = NormFunction::apply(x, Maybe(residual), weight, bias, true, eps, 0.0);
  return {out[0], out[1], out[2], out[3]};
}

Two rms_norm_autograd(const Tensor& x, const Maybe& weight, double eps, double weight_offset) {
  const variable_list out = NormFunction::apply(x, Maybe(), weight, Maybe(), false, eps, weight_offset);
  return {out[0], out[1]};
}

Three rms_norm_residual_autograd(const Tensor& x, const Tensor& residual, const Maybe& weight, double eps, double weight_offset) {
  const variable_list out = NormFunction::apply(x, Maybe(residual), weight, Maybe(), false, eps, weight_offset);
  return {out[0], out[1], out[2]};
}

// The backwards have no derivative: whoever asks for one hears about it instead of getting zeros.
struct NormGradFunction : torch::autograd::Function<NormGradFunction> {
  // `inputs`: the defined tensors of `in`, through which autograd sees what depends on what.
  static variable_list forward(AutogradContext*, at::TensorList inputs, const NormGradInputs* in) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const Three all = call_backward(*in);
    variable_list outputs{std::get<0>(all), std::get<1>(all)};
    if (std::get<2>(all).defined()) outputs.push_back(std::get<2>(all));
    return outputs;
  }
  static variable_list backward(AutogradContext*, const variable_list&) {
    TORCH_CHECK_NOT_IMPLEMENTED(false, "layer_norm and rms_norm have no second derivative: their backward cannot be differentiated");
  }
};

variable_list backward_autograd(const NormGradInputs& in) {
  variable_list inputs;
  for (const Tensor& t : {in.dy, in.dh, in.h, in.weight, in.mean, in.rstd}) {
    if (t.defined()) inputs.push_back(t);
  }
  return NormGradFunction::apply(at::TensorList(inputs), &in);
}

Three layer_norm_backward_autograd(const Tensor& dy, const Maybe& dh, const Tensor& h, const Maybe& weight, const Tensor& mean,
                                   const Tensor& rstd, Dtype parameter_dtype) {
  const variable_list out =
      backward_autograd({Norm::Layer, dy, value_or_undefined(dh), h, value_or_undefined(weight), mean, rstd, 0.0, parameter_dtype});
  return {out[0], out[1], out[2]};
}

Two rms_norm_backward_autograd(const Tensor& dy, const Maybe& dh, const Tensor& h, const Maybe& weight, const Tensor& rstd,
                               double weight_offset, Dtype parameter_dtype) {
  const variable_list out = backward_autograd(
      {Norm::Rms, dy, value_or_undefined(dh), h, value_or_undefined(weight), Tensor(), rstd, weight_offset, parameter_dtype});
  return {out[0], out[1]};
}

// ---- registration --------------------------------------------------------------------------------------------------

template <auto kernel, bool kMeta>
void add(torch::Library& m, const char* op) {
  if constexpr (kMeta) {
    implement_meta<kernel>(m, op);
  } else {
    m.impl(op, kernel);
  }
}

template <Forward kForward, Backward kBackward, bool kMeta = false>
void implement(torch::Library& m) {
  add<&layer_norm<kForward>, kMeta>(m, "layer_norm");
  add<&layer_norm_residual<kForward>, kMeta>(m, "layer_norm_residual");
  add<&layer_norm_backward<kBackward>, kMeta>(m, "layer_norm_backward");
  add<&layer_norm_backward_<kBackward>, kMeta>(m, "layer_norm_backward_");
  add<&rms_norm<kForward>, kMeta>(m, "rms_norm");
  add<&rms_norm_residual<kForward>, kMeta>(m, "rms_norm_residual");
  add<&rms_norm_backward<kBackward>, kMeta>(m, "rms_norm_backward");
  add<&rms_norm_backward_<kBackward>, kMeta>(m, "rms_norm_backward_");
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(deepspeed, m) {
  m.def("layer_norm(Tensor x, Tensor? weight, Tensor? bias, float eps) -> (Tensor y, Tensor mean, Tensor rstd)");
  m.def("layer_norm_residual(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, float eps) "
        "-> (Tensor y, Tensor h, Tensor mean, Tensor rstd)");
  m.def("layer_norm_backward(Tensor dy, Tensor? dh, Tensor h, Tensor? weight, Tensor mean, Tensor rstd, ScalarType? parameter_dtype) "
        "-> (Tensor dx, Tensor dweight, Tensor dbias)");
  m.def("layer_norm_backward_(Tensor(a!) dy, Tensor? dh, Tensor h, Tensor? weight, Tensor mean, Tensor rstd, ScalarType? parameter_dtype) "
        "-> (Tensor dweight, Tensor dbias)");
  m.def("rms_norm(Tensor x, Tensor? weight, float eps, float weight_offset=0.0) -> (Tensor y, Tensor rstd)");
  m.def("rms_norm_residual(Tensor x, Tensor residual, Tensor? weight, float eps, float weight_offset=0.0) "
        "-> (Tensor y, Tensor h, Tensor rstd)");
  m.def("rms_norm_backward(Tensor dy, Tensor? dh, Tensor h, Tensor? weight, Tensor rstd, float weight_offset, ScalarType? parameter_dtype) "
        "-> (Tensor dx, Tensor dweight)");
  m.def("rms_norm_backward_(Tensor(a!) dy, Tensor? dh, Tensor h, Tensor? weight, Tensor rstd, float weight_offset, "
        "ScalarType? parameter_dtype) -> Tensor dweight");
}

TORCH_LIBRARY_IMPL(deepspeed, CPU, m) { implement<norm_forward_cpu, norm_backward_cpu>(m); }
#ifdef DS_WITH_CUDA
TORCH_LIBRARY_IMPL(deepspeed, CUDA, m) { implement<norm_forward_cuda, norm_backward_cuda>(m); }
#endif
TORCH_LIBRARY_IMPL(deepspeed, Meta, m) { implement<norm_forward_meta, norm_backward_meta, true>(m); }

TORCH_LIBRARY_IMPL(deepspeed, Autograd, m) {
  implement_autograd<layer_norm_autograd>(m, "layer_norm");
  implement_autograd<layer_norm_residual_autograd>(m, "layer_norm_residual");
  implement_autograd<layer_norm_backward_autograd>(m, "layer_norm_backward");
  implement_autograd<rms_norm_autograd>(m, "rms_norm");
  implement_autograd<rms_norm_residual_autograd>(m, "rms_norm_residual");
  implement_autograd<rms_norm_backward_autograd>(m, "rms_norm_backward");
}

}  // namespace ds::ops
