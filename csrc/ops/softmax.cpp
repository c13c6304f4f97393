// SPDX-License-Identifier: Apache-2.0
// deepspeed::scaled_masked_softmax and its backward: tensors to rows and masks seen through strides.
#include "kernels/softmax/softmax.h"

#include <ATen/ops/empty_like.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "ops/arguments.h"
#include "ops/derivative.h"
#include "ops/fresh.h"
#include "ops/register.h"

namespace ds::ops {
namespace {

using OptionalTensor = std::optional<at::Tensor>;
using kernels::MaskView;
using kernels::SoftmaxRows;

constexpr int64_t kRowsElements = 32768;  // a thread's piece of work, in whole rows

void check_mask(const at::Tensor& x, const at::Tensor& mask) {
  check_device(mask, "mask", x, "x");
  TORCH_CHECK_VALUE(mask.layout() == at::kStrided, "mask must be a dense tensor, its layout is ", mask.layout());
  TORCH_CHECK_VALUE(mask.scalar_type() == at::kBool || is_kernel_float(mask.scalar_type()),
                    "mask: dtype must be bool, float32, bfloat16 or float16, not ", mask.scalar_type());
  bool fits = mask.dim() <= x.dim();
  for (int64_t d = 1; fits && d <= mask.dim(); ++d) fits = mask.size(-d) == 1 || mask.size(-d) == x.size(-d);
  TORCH_CHECK_VALUE(fits, "mask of shape ", mask.sizes(), " cannot be broadcast to x of shape ", x.sizes());
}

SoftmaxRows rows_of(const at::Tensor& x, const char* name, double scale, bool causal) {
  check_float(x, name);
  TORCH_CHECK_VALUE(x.dim() >= (causal ? 2 : 1), name, " has shape ", x.sizes(), ", needs at least ", causal ? "2 dimensions to be causal" : "1 dimension");
  return {x.size(-1), static_cast<float>(scale), causal && x.numel() != 0 ? x.size(-2) : 0};
}

// A mask whose rows lie in one piece, repeated over x's other dimensions by strides of 0. Copies only a mask that is itself strided or
// has one value a row.
at::Tensor expand_mask(const OptionalTensor& mask, const at::Tensor& x) {
  if (!mask.has_value() || !mask->defined()) return {};
  check_mask(x, *mask);
  at::Tensor m = mask->dim() == 0 ? mask->unsqueeze(0) : *mask;
  if (m.size(-1) != x.size(-1)) {
    auto sizes = m.sizes().vec();
    sizes.back() = x.size(-1);
    m = m.expand(sizes).contiguous();
  } else if (m.size(-1) != 1 && m.stride(-1) != 1) {
    m = m.contiguous();
  }
  return m.expand(x.sizes());
}

// `expanded` has x's sizes and must outlive the view. Neighbouring dimensions that advance as one are joined.
MaskView view_of(at::Tensor& expanded) {
  MaskView view;
  if (!expanded.defined()) return view;
  std::vector<int64_t> sizes, strides;
  for (int64_t d = 0; d + 1 < expanded.dim(); ++d) {
    const int64_t size = expanded.size(d), stride = expanded.stride(d);
    if (size == 1) continue;
    if (!sizes.empty() && strides.back() == size * stride) {
      sizes.back() *= size;
      strides.back() = stride;
    } else {
      sizes.push_back(size);
      strides.push_back(stride);
    }
  }
  if (sizes.size() > MaskView::kMaxDims) {
    expanded = expanded.contiguous();
    return view_of(expanded);
  }
  view.data = data(expanded);
  view.dtype = to_dtype(expanded.scalar_type());
  view.dims = static_cast<int>(sizes.size());
  std::copy(sizes.begin(), sizes.end(), view.sizes);
  std::copy(strides.begin(), strides.end(), view.strides);
  return view;
}

// Chunks of rows; of causal matrices from both ends in turn: their early rows are short, so threads get equal shares.
template <typename F>
void for_rows(const SoftmaxRows& s, int64_t rows, F&& body) {
  const int64_t chunk = std::max<int64_t>(1, kRowsElements / s.columns), chunks = chunks_of(rows, chunk);
  for_chunks(chunks, 1, [&](int64_t, int64_t index, int64_t) {
    const int64_t c = s.queries == 0 ? index : index % 2 == 0 ? index / 2 : chunks - 1 - index / 2;
    body(c * chunk, std::min(rows, (c + 1) * chunk));
  });
}

struct Forward {
  at::Tensor x, mask, y;
  SoftmaxRows s;
  MaskView view;

  Forward(const at::Tensor& x_, const OptionalTensor& mask_, double scale, bool causal) : s(rows_of(x_, "x", scale, causal)) {
    mask = expand_mask(mask_, x_);
    x = x_.contiguous();
    y = fresh_like(x);
    if (x.numel() != 0) view = view_of(mask);
  }
  int64_t rows() const { return x.numel() / s.columns; }
};

struct Backward {
  at::Tensor grad, y, dx;
  SoftmaxRows s;

  // in_place: dx takes the gradient's memory. An element is read before it is written.
  Backward(const at::Tensor& grad_, const at::Tensor& y_, double scale, bool causal, bool in_place) : s(rows_of(y_, "y", scale, causal)) {
    check_like(grad_, "grad", y_, "y");
    y = y_.contiguous();
    dx = in_place ? taken(grad_, "grad", {y}) : fresh_like(y);
    grad = grad_.contiguous();
    s.past_caches = !in_place && is_past_caches(dx);
    s.from_memory = is_from_memory(dx);
  }
  int64_t rows() const { return y.numel() / s.columns; }
};

at::Tensor forward_cpu(const at::Tensor& x, const OptionalTensor& mask, double scale, bool causal) {
  const Forward f(x, mask, scale, causal);
  if (f.x.numel() == 0) return f.y;
  void* y = mutable_data(f.y);
  const void* in = data(f.x);
  const DType dtype = to_dtype(f.x.scalar_type());
  for_rows(f.s, f.rows(), [&](int64_t begin, int64_t end) { kernels::softmax(y, in, dtype, f.s, f.view, begin, end); });
  return f.y;
}

at::Tensor run_backward_cpu(const Backward& b) {
  if (b.y.numel() == 0) return b.dx;
  void* dx = mutable_data(b.dx);
  const void *dy = data(b.grad), *p = data(b.y);
  const DType dtype = to_dtype(b.y.scalar_type());
  for_rows(b.s, b.rows(), [&](int64_t begin, int64_t end) { kernels::softmax_backward(dx, dy, p, dtype, b.s, begin, end); });
  return b.dx;
}

at::Tensor backward_cpu(const at::Tensor& grad, const at::Tensor& y, double scale, bool causal) {
  return run_backward_cpu({grad, y, scale, causal, false});
}

void backward_cpu_(at::Tensor& grad, const at::Tensor& y, double scale, bool causal) {
  run_backward_cpu({grad, y, scale, causal, true});
  mark_written(grad);
}

#ifdef DS_WITH_CUDA
at::Tensor forward_cuda(const at::Tensor& x, const OptionalTensor& mask, double scale, bool causal) {
  const OnGpu gpu(x);
  const Forward f(x, mask, scale, causal);
  if (f.x.numel() == 0) return f.y;
  kernels::softmax(mutable_data(f.y), data(f.x), to_dtype(f.x.scalar_type()), f.s, f.view, f.rows(), gpu.stream());
  return f.y;
}

at::Tensor run_backward_cuda(const OnGpu& gpu, const Backward& b) {
  if (b.y.numel() == 0) return b.dx;
  kernels::softmax_backward(mutable_data(b.dx), data(b.grad), data(b.y), to_dtype(b.y.scalar_type()), b.s, b.rows(), gpu.stream());
  return b.dx;
}

at::Tensor backward_cuda(const at::Tensor& grad, const at::Tensor& y, double scale, bool causal) {
  const OnGpu gpu(y);
  return run_backward_cuda(gpu, {grad, y, scale, causal, false});
}

void backward_cuda_(at::Tensor& grad, const at::Tensor& y, double scale, bool causal) {
  const OnGpu gpu(y);
  run_backward_cuda(gpu, {grad, y, scale, causal, true});
  mark_written(grad);
}
#endif

at::Tensor forward_meta(const at::Tensor& x, const OptionalTensor& mask, double scale, bool causal) {
  check_float(x, "x");
  if (mask.has_value() && mask->defined()) check_device(*mask, "mask", x, "x");
  return at::empty_like(x, at::MemoryFormat::Contiguous);
}

at::Tensor backward_meta(const at::Tensor& grad, const at::Tensor& y, double scale, bool causal) {
  return at::empty_like(y, at::MemoryFormat::Contiguous);
}

void backward_meta_(at::Tensor& grad, const at::Tensor& y, double scale, bool causal) {}

at::Tensor call_forward(const at::Tensor& x, const OptionalTensor& mask, double scale, bool causal) {
  static const auto op = find_op<decltype(forward_cpu)>("deepspeed::scaled_masked_softmax");
  return op.call(x, mask, scale, causal);
}

at::Tensor call_backward(const at::Tensor& grad, const at::Tensor& y, double scale, bool causal) {
  static const auto op = find_op<decltype(backward_cpu)>("deepspeed::scaled_masked_softmax_backward");
  return op.call(grad, y, scale, causal);
}

void call_backward_(at::Tensor grad, const at::Tensor& y, double scale, bool causal) {
  static const auto op = find_op<decltype(backward_cpu_)>("deepspeed::scaled_masked_softmax_backward_");
  op.call(grad, y, scale, causal);
}

class SoftmaxFunction : public torch::autograd::Function<SoftmaxFunction> {
 public:
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& x, const OptionalTensor& mask, double scale, bool causal) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    const at::Tensor y = call_forward(x, mask, scale, causal);
    const bool learned = mask.has_value() && mask->defined() && mask->requires_grad();
    ctx->save_for_backward({y, learned ? *mask : at::Tensor()});
    ctx->saved_data["scale"] = scale;
    ctx->saved_data["causal"] = causal;
    return y;
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx, const torch::autograd::variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const at::Tensor &grad = grads[0], &y = saved[0], &mask = saved[1];
    if (!grad.defined()) return {{}, {}, {}, {}};
    const double scale = ctx->saved_data["scale"].toDouble();
    const bool causal = ctx->saved_data["causal"].toBool();
    const auto gradient = [&](double by) {
      // Scores are the largest thing in attention: a gradient that nobody else holds becomes theirs, and nothing is allocated.
      if (!at::GradMode::is_enabled()) {
        if (!may_take(grad, y)) return call_backward(grad, y, by, causal);
        call_backward_(grad, y, by, causal);
        return grad;
      }
      return y.mul(by).mul(grad.sub(grad.mul(y).sum(-1, true)));  // to be differentiated once more; y is 0 where causality hides
    };
    if (!mask.defined()) return {gradient(scale), {}, {}, {}};
    const at::Tensor logits = gradient(1.0);
    return {scale == 1.0 ? logits : logits.mul(scale), logits.sum_to_size_symint(mask.sym_sizes()).to(mask.scalar_type()), {}, {}};
  }
};

at::Tensor forward_autograd(const at::Tensor& x, const OptionalTensor& mask, double scale, bool causal) {
  return SoftmaxFunction::apply(x, mask, scale, causal);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(deepspeed, m) {
  m.def("scaled_masked_softmax(Tensor x, Tensor? mask, float scale, bool causal) -> Tensor");
  m.def("scaled_masked_softmax_backward(Tensor grad, Tensor y, float scale, bool causal) -> Tensor");
  m.def("scaled_masked_softmax_backward_(Tensor(a!) grad, Tensor y, float scale, bool causal) -> ()");
}
TORCH_LIBRARY_IMPL(deepspeed, CPU, m) {
  m.impl("scaled_masked_softmax", forward_cpu);
  m.impl("scaled_masked_softmax_backward", backward_cpu);
  m.impl("scaled_masked_softmax_backward_", backward_cpu_);
}
#ifdef DS_WITH_CUDA
TORCH_LIBRARY_IMPL(deepspeed, CUDA, m) {
  m.impl("scaled_masked_softmax", forward_cuda);
  m.impl("scaled_masked_softmax_backward", backward_cuda);
  m.impl("scaled_masked_softmax_backward_", backward_cuda_);
}
#endif
TORCH_LIBRARY_IMPL(deepspeed, Meta, m) {
  implement_meta<forward_meta>(m, "scaled_masked_softmax");
  implement_meta<backward_meta>(m, "scaled_masked_softmax_backward");
  implement_meta<backward_meta_>(m, "scaled_masked_softmax_backward_");
}
TORCH_LIBRARY_IMPL(deepspeed, Autograd, m) { implement_autograd<forward_autograd>(m, "scaled_masked_softmax"); }

}  // namespace ds::ops
