// SPDX-License-Identifier: Apache-2.0
// deepspeed::cross_entropy: losses of given logits, one a row. deepspeed::linear_cross_entropy is in linear_cross_entropy.cpp.
#include "ops/cross_entropy.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "ops/arguments.h"
#include "ops/derivative.h"
#include "ops/fresh.h"
#include "ops/register.h"

#ifdef DS_WITH_CUDA
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAFunctions.h>
#include <cuda_runtime_api.h>
#endif

namespace ds::ops {

#ifdef DS_WITH_CUDA
namespace {

// A word for each GPU, see Note [Labels on a GPU].
class LabelReports {
 public:
  // The memory stays to the end: kernels may still run when statics go.
  static LabelReports& instance() {
    static auto* reports = new LabelReports;
    return *reports;
  }

  uint64_t* on_device(at::Device device) const { return device_ + device.index(); }

  void raise(at::Device device) {
    volatile int64_t& word = host_.mutable_data_ptr<int64_t>()[device.index()];
    const auto said = static_cast<uint64_t>(word);
    if (said == 0) return;
    word = 0;
    const kernels::BadLabel bad = kernels::bad_label_of(said);
    TORCH_CHECK_VALUE(false, "labels[", bad.row, "] of an earlier cross-entropy on ", device, " was ", bad.label,
                      ", which is neither in the vocabulary nor ignore_index: that row's loss and gradient are NaN");
  }

 private:
  LabelReports() : host_(at::zeros({c10::cuda::device_count()}, at::TensorOptions().dtype(at::kLong).pinned_memory(true))) {
    void* address = nullptr;
    C10_CUDA_CHECK(cudaHostGetDevicePointer(&address, host_.mutable_data_ptr(), 0));
    device_ = static_cast<uint64_t*>(address);
  }

  at::Tensor host_;
  uint64_t* device_ = nullptr;
};

}  // namespace
#endif

std::optional<int64_t> check_labels(const at::Tensor& labels, const kernels::CrossEntropy& c) {
#ifdef DS_WITH_CUDA
  if (labels.is_cuda()) {
    LabelReports::instance().raise(labels.device());
    return std::nullopt;
  }
#endif
  int64_t counted = 0;
  const auto* values = labels.const_data_ptr<int64_t>();
  const int64_t bad = kernels::find_bad_label(values, labels.numel(), c, &counted);
  TORCH_CHECK_VALUE(bad < 0, "labels[", bad, "] is ", values[bad < 0 ? 0 : bad], ", must lie in [0, ", c.columns, ") or be the ignored ", c.ignored);
  return counted;
}

void check_label_tensor(const at::Tensor& labels, const at::Tensor& like, const char* name) {
  check_device(labels, "labels", like, name);
  TORCH_CHECK_VALUE(labels.scalar_type() == at::kLong, "labels: dtype must be int64, not ", labels.scalar_type());
}

void check_settings(double smoothing, double z_loss) {
  TORCH_CHECK_VALUE(smoothing >= 0.0 && smoothing <= 1.0, "label_smoothing must lie in [0, 1], got ", smoothing);
  TORCH_CHECK_VALUE(z_loss >= 0.0, "z_loss must not be negative, got ", z_loss);
}

void losses_of_rows(float* losses, float* stats, const at::Tensor& logits, const int64_t* labels, const kernels::CrossEntropy& c,
                    [[maybe_unused]] int64_t first_row) {
  const int64_t rows = logits.size(0);
  const DType dtype = to_dtype(logits.scalar_type());
#ifdef DS_WITH_CUDA
  if (logits.is_cuda()) {
    const OnGpu gpu(logits);
    const kernels::LabelReport report{LabelReports::instance().on_device(logits.device()), first_row};
    return kernels::cross_entropy(losses, stats, data(logits), dtype, labels, c, rows, gpu.stream(), report);
  }
#endif
  const void* x = data(logits);
  for_chunks(rows, std::max<int64_t>(1, kChunkElements / c.columns),
             [&](int64_t, int64_t begin, int64_t end) { kernels::cross_entropy(losses, stats, x, dtype, labels, c, begin, end); });
}

void gradients_of_rows(void* dx, const at::Tensor& logits, const int64_t* labels, const float* stats, const float* weights, float weight,
                       const kernels::CrossEntropy& c) {
  const int64_t rows = logits.size(0);
  const DType dtype = to_dtype(logits.scalar_type());
  const void* x = data(logits);
#ifdef DS_WITH_CUDA
  if (logits.is_cuda()) {
    const OnGpu gpu(logits);
    return kernels::cross_entropy_backward(dx, x, dtype, labels, stats, weights, weight, c, rows, gpu.stream());
  }
#endif
  for_chunks(rows, std::max<int64_t>(1, kChunkElements / c.columns), [&](int64_t, int64_t begin, int64_t end) {
    kernels::cross_entropy_backward(dx, x, dtype, labels, stats, weights, weight, c, begin, end);
  });
}

namespace {

using kernels::CrossEntropy;
using Two = std::tuple<at::Tensor, at::Tensor>;

CrossEntropy settings(int64_t columns, int64_t ignored, double smoothing, double z_loss) {
  check_settings(smoothing, z_loss);
  return {columns, ignored, static_cast<float>(smoothing), static_cast<float>(z_loss)};
}

void check(const at::Tensor& logits, const at::Tensor& labels) {
  check_float(logits, "logits");
  check_label_tensor(labels, logits, "logits");
  TORCH_CHECK_VALUE(logits.dim() == 2, "logits must be [rows, columns], their shape is ", logits.sizes());
  check_shape(labels, "labels", logits.sizes().slice(0, 1));
  TORCH_CHECK_VALUE(logits.size(0) == 0 || logits.size(1) > 0, "logits have no columns, their shape is ", logits.sizes());
}

Two forward(const at::Tensor& logits, const at::Tensor& labels, int64_t ignored, double smoothing, double z_loss) {
  check(logits, labels);
  const CrossEntropy c = settings(logits.size(1), ignored, smoothing, z_loss);
  const at::Tensor x = logits.contiguous(), t = labels.contiguous();
  check_labels(t, c);
  const at::Tensor losses = at::empty({x.size(0)}, x.options().dtype(at::kFloat)), stats = at::empty({x.size(0), 2}, losses.options());
  if (x.size(0) != 0) {
    losses_of_rows(losses.mutable_data_ptr<float>(), stats.mutable_data_ptr<float>(), x, t.const_data_ptr<int64_t>(), c);
  }
  return {losses, stats};
}

// Into dx, which may be the logits.
void backward_into(const at::Tensor& dx, const at::Tensor& grad, const at::Tensor& logits, const at::Tensor& labels, const at::Tensor& stats,
                   int64_t ignored, double smoothing, double z_loss) {
  check(logits, labels);
  const CrossEntropy c = settings(logits.size(1), ignored, smoothing, z_loss);
  TORCH_CHECK_VALUE(grad.scalar_type() == at::kFloat && stats.scalar_type() == at::kFloat, "grad and stats must be float32");
  check_shape(grad, "grad", labels.sizes());
  check_shape(stats, "stats", {logits.size(0), 2});
  check_device(grad, "grad", logits, "logits");
  check_device(stats, "stats", logits, "logits");
  if (logits.numel() == 0) return;
  const at::Tensor g = grad.contiguous(), t = labels.contiguous(), s = stats.contiguous();
  check_labels(t, c);
  gradients_of_rows(mutable_data(dx), logits, t.const_data_ptr<int64_t>(), s.const_data_ptr<float>(), g.const_data_ptr<float>(), 1.0f, c);
}

at::Tensor backward(const at::Tensor& grad, const at::Tensor& logits, const at::Tensor& labels, const at::Tensor& stats, int64_t ignored,
                    double smoothing, double z_loss) {
  const at::Tensor x = logits.contiguous(), dx = fresh_like(x);
  backward_into(dx, grad, x, labels, stats, ignored, smoothing, z_loss);
  return dx;
}

void backward_in_place(at::Tensor& logits, const at::Tensor& grad, const at::Tensor& labels, const at::Tensor& stats, int64_t ignored,
                       double smoothing, double z_loss) {
  TORCH_CHECK_VALUE(logits.is_contiguous(), "logits must be contiguous to be overwritten by their gradient");
  backward_into(logits, grad, logits, labels, stats, ignored, smoothing, z_loss);
  mark_written(logits);
}

Two forward_meta(const at::Tensor& logits, const at::Tensor& labels, int64_t, double, double) {
  check_float(logits, "logits");
  check_label_tensor(labels, logits, "logits");
  const auto options = logits.options().dtype(at::kFloat);
  return {at::empty_symint({logits.sym_size(0)}, options), at::empty_symint({logits.sym_size(0), 2}, options)};
}

at::Tensor backward_meta(const at::Tensor&, const at::Tensor& logits, const at::Tensor&, const at::Tensor&, int64_t, double, double) {
  return at::empty_like(logits, at::MemoryFormat::Contiguous);
}

void in_place_meta(at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, int64_t, double, double) {}

Two call_forward(const at::Tensor& logits, const at::Tensor& labels, int64_t ignored, double smoothing, double z_loss) {
  static const auto op = find_op<decltype(forward)>("deepspeed::cross_entropy");
  return op.call(logits, labels, ignored, smoothing, z_loss);
}

at::Tensor call_backward(const at::Tensor& grad, const at::Tensor& logits, const at::Tensor& labels, const at::Tensor& stats, int64_t ignored,
                         double smoothing, double z_loss) {
  static const auto op = find_op<decltype(backward)>("deepspeed::cross_entropy_backward");
  return op.call(grad, logits, labels, stats, ignored, smoothing, z_loss);
}

class CrossEntropyFunction : public torch::autograd::Function<CrossEntropyFunction> {
 public:
  static torch::autograd::variable_list forward(torch::autograd::AutogradContext* ctx, const at::Tensor& logits, const at::Tensor& labels,
                                                int64_t ignored, double smoothing, double z_loss) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    auto [losses, stats] = call_forward(logits, labels, ignored, smoothing, z_loss);
    ctx->save_for_backward({logits, labels, stats});
    ctx->mark_non_differentiable({stats});
    ctx->saved_data["ignored"] = ignored;
    ctx->saved_data["smoothing"] = smoothing;
    ctx->saved_data["z_loss"] = z_loss;
    return {losses, stats};
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx, const torch::autograd::variable_list& grads) {
    if (!grads[0].defined()) return {{}, {}, {}, {}, {}};
    TORCH_CHECK(!at::GradMode::is_enabled(), "deepspeed::cross_entropy has no second derivative: use torch.nn.functional.cross_entropy");
    const auto saved = ctx->get_saved_variables();
    return {call_backward(grads[0], saved[0], saved[1], saved[2], ctx->saved_data["ignored"].toInt(), ctx->saved_data["smoothing"].toDouble(),
                          ctx->saved_data["z_loss"].toDouble()),
            {}, {}, {}, {}};
  }
};

Two forward_autograd(const at::Tensor& logits, const at::Tensor& labels, int64_t ignored, double smoothing, double z_loss) {
  const auto results = CrossEntropyFunction::apply(logits, labels, ignored, smoothing, z_loss);
  return {results[0], results[1]};
}

void implement(torch::Library& m) {
  m.impl("cross_entropy", forward);
  m.impl("cross_entropy_backward", backward);
  m.impl("cross_entropy_backward_", backward_in_place);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(deepspeed, m) {
  m.def("cross_entropy(Tensor logits, Tensor labels, int ignore_index, float label_smoothing, float z_loss) -> (Tensor losses, Tensor stats)");
  m.def("cross_entropy_backward(Tensor grad, Tensor logits, Tensor labels, Tensor stats, int ignore_index, float label_smoothing, "
        "float z_loss) -> Tensor");
  m.def("cross_entropy_backward_(Tensor(a!) logits, Tensor grad, Tensor labels, Tensor stats, int ignore_index, float label_smoothing, "
        "float z_loss) -> ()");
}
TORCH_LIBRARY_IMPL(deepspeed, CPU, m) { implement(m); }
#ifdef DS_WITH_CUDA
TORCH_LIBRARY_IMPL(deepspeed, CUDA, m) { implement(m); }
#endif
TORCH_LIBRARY_IMPL(deepspeed, Meta, m) {
  implement_meta<forward_meta>(m, "cross_entropy");
  implement_meta<backward_meta>(m, "cross_entropy_backward");
  implement_meta<in_place_meta>(m, "cross_entropy_backward_");
}
TORCH_LIBRARY_IMPL(deepspeed, Autograd, m) { implement_autograd<forward_autograd>(m, "cross_entropy"); }

}  // namespace ds::ops
