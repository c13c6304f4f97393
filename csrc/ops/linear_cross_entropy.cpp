// SPDX-License-Identifier: Apache-2.0
// deepspeed::linear_cross_entropy: the loss of hidden W^T + bias without ever holding all logits. Per chunk of tokens: GEMM into one buffer,
// losses, gradients in the buffer's place, GEMMs into the gradients of hidden and weight.
//
// Note [Gradients in the forward pass]: with a sum or a mean every row's weight is known beforehand, so that the gradients are made while
// the chunk's logits are there; backward only hands them over, times the incoming gradient where that is not 1. Without a reduction
// (row weights come with backward) the chunks are computed once more.
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "ops/arguments.h"
#include "ops/derivative.h"
#include "ops/cross_entropy.h"
#include "ops/fresh.h"
#include "ops/register.h"

namespace ds::ops {
namespace {

using OptionalTensor = std::optional<at::Tensor>;
using kernels::CrossEntropy;
using Four = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

enum Reduction : int64_t { kNone, kSum, kMean };

// Bytes of logits held at once, unless the caller says how many tokens. Small enough to matter nowhere, large enough for a GEMM's full speed.
constexpr int64_t kBufferBytesCpu = int64_t{64} << 20, kBufferBytesGpu = int64_t{256} << 20;

int64_t tokens_of_chunk(int64_t asked, const at::Tensor& hidden, int64_t vocabulary) {
  TORCH_CHECK_VALUE(asked >= 0, "chunk_tokens must be positive, got ", asked);
  if (asked > 0) return asked;
  const int64_t budget = hidden.is_cpu() ? kBufferBytesCpu : kBufferBytesGpu;
  const int64_t fits = budget / std::max<int64_t>(1, vocabulary * hidden.element_size());
  return fits >= 64 ? fits / 64 * 64 : std::max<int64_t>(1, fits);
}

void check(const at::Tensor& hidden, const at::Tensor& weight, const OptionalTensor& bias, const at::Tensor& labels) {
  check_float(hidden, "hidden");
  TORCH_CHECK_VALUE(hidden.dim() == 2, "hidden must be [tokens, features], its shape is ", hidden.sizes());
  check_float(weight, "weight");
  check_device(weight, "weight", hidden, "hidden");
  check_dtype(weight, "weight", hidden, "hidden");
  TORCH_CHECK_VALUE(weight.dim() == 2 && weight.size(1) == hidden.size(1), "weight has shape ", weight.sizes(), ", expected [vocabulary, ",
                    hidden.size(1), "]");
  TORCH_CHECK_VALUE(weight.size(0) > 0 || hidden.size(0) == 0, "weight has no rows");
  if (bias.has_value()) check_vector(*bias, "bias", weight.size(0), hidden, "hidden");
  check_label_tensor(labels, hidden, "hidden");
  check_shape(labels, "labels", hidden.sizes().slice(0, 1));
}

// One pass over the tokens.
class Chunks {
 public:
  Chunks(const at::Tensor& hidden, const at::Tensor& weight, const OptionalTensor& bias, const at::Tensor& labels, const CrossEntropy& c,
         int64_t tokens)
      : hidden_(hidden), weight_(weight), labels_(labels), c_(c), chunk_(std::min(tokens, hidden.size(0))) {
    if (bias.has_value()) bias_ = bias->to(hidden.scalar_type());
    const auto floats = hidden.options().dtype(at::kFloat);
    losses_ = at::empty({hidden.size(0)}, floats);
    stats_ = at::empty({chunk_, 2}, floats);
    logits_ = fresh({chunk_, weight.size(0)}, hidden.options());
  }

  // Gradients of the sum of row_weight * loss, or row_weights[i] * loss[i], are wanted of these. 16-bit weights' are added in float32.
  void want(bool hidden, bool weight, bool bias) {
    const auto floats = hidden_.options().dtype(at::kFloat);
    if (hidden) d_hidden_ = fresh_like(hidden_);
    if (weight) d_weight_ = fresh(weight_.sizes(), floats);
    if (bias && bias_.defined()) d_bias_ = at::zeros({weight_.size(0)}, floats);
    if (weight && weight_.scalar_type() != at::kFloat) product_ = fresh(weight_.sizes(), weight_.options());
  }

  void run(const at::Tensor& row_weights, float row_weight) {
    const int64_t tokens = hidden_.size(0);
    if (tokens == 0 && d_weight_.defined()) d_weight_.zero_();
    for (int64_t begin = 0; begin < tokens; begin += chunk_) {
      run_chunk(begin, std::min(tokens - begin, chunk_), row_weights, row_weight);
    }
  }

  at::Tensor losses() const { return losses_; }
  at::Tensor d_hidden() const { return d_hidden_; }
  at::Tensor d_weight() const { return d_weight_.defined() ? d_weight_.to(weight_.scalar_type()) : d_weight_; }
  at::Tensor d_bias(at::ScalarType type) const { return d_bias_.defined() ? d_bias_.to(type) : d_bias_; }

 private:
  void run_chunk(int64_t begin, int64_t count, const at::Tensor& row_weights, float row_weight) {
    at::Tensor logits = logits_.narrow(0, 0, count);
    const at::Tensor hidden = hidden_.narrow(0, begin, count);
    if (bias_.defined()) at::addmm_out(logits, bias_, hidden, weight_.t());
    else at::mm_out(logits, hidden, weight_.t());
    const auto* labels = labels_.const_data_ptr<int64_t>() + begin;
    auto* stats = stats_.mutable_data_ptr<float>();
    losses_of_rows(losses_.mutable_data_ptr<float>() + begin, stats, logits, labels, c_, begin);
    if (!d_hidden_.defined() && !d_weight_.defined() && !d_bias_.defined()) return;
    const float* weights = row_weights.defined() ? row_weights.const_data_ptr<float>() + begin : nullptr;
    gradients_of_rows(logits.mutable_data_ptr(), logits, labels, stats, weights, row_weight, c_);
    if (d_hidden_.defined()) {
      at::Tensor out = d_hidden_.narrow(0, begin, count);
      at::mm_out(out, logits, weight_);
    }
    if (d_weight_.defined()) add_weight_gradient(logits, hidden, begin == 0);
    if (d_bias_.defined()) d_bias_.add_(logits.sum(at::IntArrayRef({0}), false, at::kFloat));
  }

  void add_weight_gradient(const at::Tensor& d_logits, const at::Tensor& hidden, bool first) {
    if (product_.defined()) {
      at::mm_out(product_, d_logits.t(), hidden);
      first ? d_weight_.copy_(product_) : d_weight_.add_(product_);
    } else if (first) {
      at::mm_out(d_weight_, d_logits.t(), hidden);
    } else {
      d_weight_.addmm_(d_logits.t(), hidden);
    }
  }

  at::Tensor hidden_, weight_, bias_, labels_;
  CrossEntropy c_;
  int64_t chunk_;
  at::Tensor losses_, stats_, logits_, product_;
  at::Tensor d_hidden_, d_weight_, d_bias_;
};

// losses (or the reduced loss) and the gradients asked for by `needs` (hidden, weight, bias); others are empty.
Four chunks(const at::Tensor& hidden, const at::Tensor& weight, const OptionalTensor& bias, const at::Tensor& labels,
            const OptionalTensor& row_weights, int64_t reduction, int64_t ignored, double smoothing, double z_loss, int64_t chunk_tokens,
            std::array<bool, 3> needs) {
  at::NoGradGuard no_grad;
  check(hidden, weight, bias, labels);
  check_settings(smoothing, z_loss);
  TORCH_CHECK_VALUE(reduction >= kNone && reduction <= kMean, "reduction must be 0, 1 or 2, got ", reduction);
  const CrossEntropy c{weight.size(0), ignored, static_cast<float>(smoothing), static_cast<float>(z_loss)};
  const at::Tensor t = labels.contiguous();
  at::Tensor w = row_weights.has_value() ? row_weights->contiguous() : at::Tensor();
  if (w.defined()) {
    TORCH_CHECK_VALUE(w.scalar_type() == at::kFloat, "row_weights: dtype must be float32, not ", w.scalar_type());
    check_shape(w, "row_weights", labels.sizes());
    check_device(w, "row_weights", hidden, "hidden");
  }
  const std::optional<int64_t> known = check_labels(t, c);
  at::Tensor counted;  // labels that are not ignored; a GPU keeps the number to itself
  if (reduction == kMean && !known) {
    counted = t.ne(ignored).sum();
    if (!w.defined()) w = counted.to(at::kDouble).reciprocal().to(at::kFloat).expand_as(t).contiguous();
  }
  Chunks pass(hidden.contiguous(), weight, bias, t, c, tokens_of_chunk(chunk_tokens, hidden, weight.size(0)));
  pass.want(needs[0], needs[1], needs[2]);
  pass.run(w, reduction == kMean && known.value_or(0) != 0 ? static_cast<float>(1.0 / static_cast<double>(*known)) : 1.0f);
  at::Tensor loss = pass.losses();
  if (reduction != kNone) loss = loss.sum(at::kDouble);
  if (reduction == kMean) loss = known ? loss.div(static_cast<double>(*known)) : loss.div(counted);  // of no token: NaN
  const auto or_empty = [&](const at::Tensor& g) { return g.defined() ? g : at::empty({0}, hidden.options()); };
  return {loss.to(at::kFloat), or_empty(pass.d_hidden()), or_empty(pass.d_weight()),
          or_empty(pass.d_bias(bias.has_value() ? bias->scalar_type() : hidden.scalar_type()))};
}

Four chunks_meta(const at::Tensor& hidden, const at::Tensor& weight, const OptionalTensor& bias, const at::Tensor& labels, const OptionalTensor&,
                 int64_t reduction, int64_t, double, double, int64_t, std::array<bool, 3> needs) {
  check_float(hidden, "hidden");
  check_label_tensor(labels, hidden, "hidden");
  const auto like = [&](bool wanted, const at::Tensor& t) {
    return wanted ? at::empty_like(t, at::MemoryFormat::Contiguous) : at::empty({0}, hidden.options());
  };
  const auto floats = hidden.options().dtype(at::kFloat);
  return {reduction == kNone ? at::empty_symint({hidden.sym_size(0)}, floats) : at::empty({}, floats), like(needs[0], hidden),
          like(needs[1], weight), like(needs[2] && bias.has_value(), bias.has_value() ? *bias : weight)};
}

Four call_chunks(const at::Tensor& hidden, const at::Tensor& weight, const OptionalTensor& bias, const at::Tensor& labels,
                 const OptionalTensor& row_weights, int64_t reduction, int64_t ignored, double smoothing, double z_loss, int64_t chunk_tokens,
                 std::array<bool, 3> needs) {
  static const auto op = find_op<decltype(chunks)>("deepspeed::linear_cross_entropy_chunks");
  return op.call(hidden, weight, bias, labels, row_weights, reduction, ignored, smoothing, z_loss, chunk_tokens, needs);
}

// The loss alone.
at::Tensor loss_only(const at::Tensor& hidden, const at::Tensor& weight, const OptionalTensor& bias, const at::Tensor& labels, int64_t reduction,
                     int64_t ignored, double smoothing, double z_loss, int64_t chunk_tokens) {
  return std::get<0>(call_chunks(hidden, weight, bias, labels, {}, reduction, ignored, smoothing, z_loss, chunk_tokens, {false, false, false}));
}

// x *= factor, unless the factor is 1: then x is not touched. On a GPU it is multiplied in any case: looking would wait for the device.
void scale_unless_one(at::Tensor& x, const at::Tensor& factor) {
  TORCH_CHECK_VALUE(factor.numel() == 1, "factor must have one element, its shape is ", factor.sizes());
  mark_written(x);
  if (x.is_cuda()) {
    x.mul_(factor.view({}));
  } else if (x.numel() != 0 && factor.item<double>() != 1.0) {
    x.mul_(factor.item());
  }
}

void scale_unless_one_meta(at::Tensor&, const at::Tensor&) {}

void call_scale(at::Tensor& x, const at::Tensor& factor) {
  static const auto op = find_op<decltype(scale_unless_one)>("deepspeed::scale_unless_one_");
  op.call(x, factor);
}

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

class LinearCrossEntropy : public torch::autograd::Function<LinearCrossEntropy> {
 public:
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& hidden, const at::Tensor& weight, const OptionalTensor& bias,
                            const at::Tensor& labels, int64_t reduction, int64_t ignored, double smoothing, double z_loss, int64_t chunk_tokens) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    // fp16 gradients made before the loss scale is known would vanish or overflow: they are made in backward.
    const bool gradients = reduction != kNone && hidden.scalar_type() != at::kHalf;
    const std::array<bool, 3> needs = {hidden.requires_grad(), weight.requires_grad(), bias.has_value() && bias->requires_grad()};
    const auto now = gradients ? needs : std::array<bool, 3>{false, false, false};
    auto [loss, d_hidden, d_weight, d_bias] =
        call_chunks(hidden, weight, bias, labels, {}, reduction, ignored, smoothing, z_loss, chunk_tokens, now);
    ctx->saved_data["needs"] = c10::List<bool>({needs[0], needs[1], needs[2]});
    if (gradients) {
      ctx->saved_data["gradients"] = std::vector<at::Tensor>{d_hidden, d_weight, d_bias};
      return loss;
    }
    ctx->save_for_backward({hidden, weight, bias.has_value() ? *bias : at::Tensor(), labels});
    ctx->saved_data["settings"] = std::make_tuple(ignored, smoothing, z_loss, chunk_tokens, reduction);
    return loss;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list results(9);
    if (!grads[0].defined()) return results;
    TORCH_CHECK(!at::GradMode::is_enabled(), "deepspeed::linear_cross_entropy has no second derivative: use torch.nn.functional.cross_entropy");
    const auto needs = ctx->saved_data["needs"].toBoolList();
    variable_list gradients;
    if (const auto made = ctx->saved_data.find("gradients"); made != ctx->saved_data.end()) {
      TORCH_CHECK(!made->second.isNone(), "deepspeed::linear_cross_entropy: backward ran a second time, but its gradients were made in the "
                  "forward pass and given away by the first; use reduction='none', or call it again");
      gradients = made->second.toTensorVector();
      made->second = c10::IValue();
      for (at::Tensor& g : gradients) call_scale(g, grads[0]);
    } else {
      gradients = recompute(ctx, grads[0], {needs[0], needs[1], needs[2]});
    }
    for (int i = 0; i < 3; ++i) {
      if (needs[i]) results[i] = std::move(gradients[i]);
    }
    return results;
  }

 private:
  static variable_list recompute(AutogradContext* ctx, const at::Tensor& grad, std::array<bool, 3> needs) {
    const auto saved = ctx->get_saved_variables();
    const auto settings = ctx->saved_data["settings"].toTuple();
    const auto& s = settings->elements();
    const at::Tensor& labels = saved[3];
    at::Tensor weights = grad;
    if (s[4].toInt() == kMean) weights = grad.div(labels.ne(s[0].toInt()).sum());
    if (s[4].toInt() != kNone) weights = weights.expand_symint(labels.sym_sizes());
    auto [losses, d_hidden, d_weight, d_bias] =
        call_chunks(saved[0], saved[1], saved[2].defined() ? OptionalTensor(saved[2]) : std::nullopt, labels, weights, kNone, s[0].toInt(),
                    s[1].toDouble(), s[2].toDouble(), s[3].toInt(), needs);
    return {d_hidden, d_weight, d_bias};
  }
};

at::Tensor autograd(const at::Tensor& hidden, const at::Tensor& weight, const OptionalTensor& bias, const at::Tensor& labels, int64_t reduction,
                    int64_t ignored, double smoothing, double z_loss, int64_t chunk_tokens) {
  const auto any = [&](auto&& holds) { return holds(hidden) || holds(weight) || (bias.has_value() && holds(*bias)); };
  const bool wanted = at::GradMode::is_enabled() && any([](const at::Tensor& t) { return t.requires_grad(); });
  // Forward-mode derivatives are refused by Function::apply.
  const bool has_tangent = any([](const at::Tensor& t) { return torch::autograd::isFwGradDefined(t); });
  if (wanted || has_tangent) return LinearCrossEntropy::apply(hidden, weight, bias, labels, reduction, ignored, smoothing, z_loss, chunk_tokens);
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  return loss_only(hidden, weight, bias, labels, reduction, ignored, smoothing, z_loss, chunk_tokens);
}

void implement(torch::Library& m) {
  m.impl("linear_cross_entropy_chunks", chunks);
  m.impl("linear_cross_entropy", loss_only);
  m.impl("scale_unless_one_", scale_unless_one);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(deepspeed, m) {
  m.def("linear_cross_entropy(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, int reduction, int ignore_index, "
        "float label_smoothing, float z_loss, int chunk_tokens) -> Tensor");
  m.def("linear_cross_entropy_chunks(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor? row_weights, int reduction, "
        "int ignore_index, float label_smoothing, float z_loss, int chunk_tokens, bool[3] needs) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("scale_unless_one_(Tensor(a!) x, Tensor factor) -> ()");
}
TORCH_LIBRARY_IMPL(deepspeed, CPU, m) { implement(m); }
#ifdef DS_WITH_CUDA
TORCH_LIBRARY_IMPL(deepspeed, CUDA, m) { implement(m); }
#endif
TORCH_LIBRARY_IMPL(deepspeed, Meta, m) {
  implement_meta<chunks_meta>(m, "linear_cross_entropy_chunks");
  implement_meta<loss_only>(m, "linear_cross_entropy");
  implement_meta<scale_unless_one_meta>(m, "scale_unless_one_");
}
TORCH_LIBRARY_IMPL(deepspeed, Autograd, m) { implement_autograd<autograd>(m, "linear_cross_entropy"); }

}  // namespace ds::ops
