// SPDX-License-Identifier: Apache-2.0
// deepspeed::rope: rotary position embedding of queries and keys together. Its gradient is the operator itself with `inverse` turned round.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty_like.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <array>
#include <tuple>

#include "kernels/rope/rope.h"
#include "ops/arguments.h"
#include "ops/derivative.h"
#include "ops/register.h"

namespace ds::ops {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using QK = std::tuple<Tensor, Tensor>;

struct Style {
  bool interleaved, heads_first, inverse;
};

struct Dims {
  int64_t batch, seq, dim;
};

Dims dims_of(const Tensor& q, const Style& style) { return {q.size(0), q.size(style.heads_first ? 2 : 1), q.size(3)}; }

void check_tensors(const Tensor& q, const Tensor& k, const Style& style) {
  check_float(q, "q");
  check_float(k, "k");
  check_device(k, "k", q, "q");
  check_dtype(k, "k", q, "q");
  const char* layout = style.heads_first ? "[batch, heads, seq, dim]" : "[batch, seq, heads, dim]";
  TORCH_CHECK_VALUE(q.dim() == 4, "q must be ", layout, ", its shape is ", q.sizes());
  TORCH_CHECK_VALUE(k.dim() == 4, "k must be ", layout, ", its shape is ", k.sizes());
  const Dims of_q = dims_of(q, style), of_k = dims_of(k, style);
  TORCH_CHECK_VALUE(of_q.batch == of_k.batch && of_q.seq == of_k.seq && of_q.dim == of_k.dim, "k has shape ", k.sizes(), ", q ", q.sizes(),
                    ": only the number of heads may differ");
}

void check_positions(const Tensor& positions, const Dims& dims, const Tensor& q) {
  check_device(positions, "positions", q, "q");
  TORCH_CHECK_VALUE(positions.scalar_type() == at::kLong, "positions must be int64, not ", positions.scalar_type());
  const auto sizes = positions.sizes();
  TORCH_CHECK_VALUE(sizes == at::IntArrayRef{dims.seq} || sizes == at::IntArrayRef({dims.batch, dims.seq}) ||
                        sizes == at::IntArrayRef({1, dims.seq}),
                    "positions must have shape [", dims.seq, "] or [", dims.batch, ", ", dims.seq, "], not ", sizes);
}

// The tables as the kernels want them; `cos`, `sin` and `positions` are contiguous.
kernels::RopeTables tables_of(const Tensor& cos, const Tensor& sin, const Tensor& positions, const Dims& dims, const Tensor& q) {
  check_float(cos, "cos");
  check_like(sin, "sin", cos, "cos");
  check_device(cos, "cos", q, "q");
  TORCH_CHECK_VALUE(cos.scalar_type() == at::kFloat || cos.scalar_type() == q.scalar_type(), "cos is ", cos.scalar_type(),
                    ", must be float32 or ", q.scalar_type(), " as q");
  TORCH_CHECK_VALUE(cos.dim() == 2 || (cos.dim() == 3 && !positions.defined()), "cos must be [rows, width]",
                    positions.defined() ? "" : " or [batch, rows, width]", ", its shape is ", cos.sizes());
  const int64_t rows = cos.size(-2);
  kernels::RopeTables tables{data(cos), data(sin), to_dtype(cos.scalar_type()), cos.size(-1), rows, 0, nullptr, 0};
  if (positions.defined()) {
    check_positions(positions, dims, q);
    tables.positions = static_cast<const int64_t*>(positions.const_data_ptr());
    tables.positions_batch = positions.dim() == 2 && positions.size(0) > 1 ? dims.seq : 0;
  } else {
    TORCH_CHECK_VALUE(rows >= dims.seq, "cos has ", rows, " rows, fewer than the ", dims.seq, " positions of q");
    TORCH_CHECK_VALUE(cos.dim() == 2 || cos.size(0) == dims.batch || cos.size(0) == 1, "cos has batch ", cos.size(0), ", q ", dims.batch);
    if (cos.dim() == 3 && cos.size(0) > 1) tables.batch_rows = rows;
    tables.rows = cos.numel() / std::max<int64_t>(1, cos.size(-1));
  }
  return tables;
}

kernels::RopeShape shape_of(const Dims& dims, int64_t rotary_dim, int64_t width, const Style& style) {
  const int64_t rotary = rotary_dim < 0 ? dims.dim : rotary_dim;
  TORCH_CHECK_VALUE(rotary <= dims.dim && rotary % 2 == 0, "rotary_dim must be even and at most ", dims.dim, ", got ", rotary);
  TORCH_CHECK_VALUE(width == rotary || 2 * width == rotary, "cos has ", width, " columns, must have rotary_dim = ", rotary, " or half of it");
  return {dims.batch, dims.seq, dims.dim, rotary, style.interleaved, style.inverse};
}

// The last dimension must be contiguous; the others keep their strides.
Tensor with_rows(const Tensor& x) { return x.size(-1) <= 1 || x.stride(-1) == 1 ? x : x.contiguous(); }

// Strides as x where x is dense, so that a transposed view is read and written along memory. Also for tensors with sizes alone.
Tensor output_for(const Tensor& x) {
  Tensor out = at::empty_like(x);
  if (x.sym_size(-1) <= 1 || out.sym_stride(-1) == 1) return out;
  return at::empty_symint(x.sym_sizes(), x.options());
}

kernels::RopeTensor tensor_of(const Tensor& in, Tensor& out, const Style& style) {
  const int seq = style.heads_first ? 2 : 1, head = style.heads_first ? 1 : 2;
  return {data(in), mutable_data(out), in.size(head), in.stride(0), in.stride(seq), in.stride(head), out.stride(0), out.stride(seq),
          out.stride(head)};
}

// Whether the kernels can overwrite x: any strides will do, but for rows in pieces and elements at one place.
bool is_writable(const Tensor& x) { return x.is_non_overlapping_and_dense() && (x.size(-1) <= 1 || x.stride(-1) == 1); }

void check_in_place(const Tensor& q, const Tensor& k) {
  TORCH_CHECK_VALUE(is_writable(q), "q must be dense, its last dimension contiguous, to be overwritten; its strides are ", q.strides());
  TORCH_CHECK_VALUE(is_writable(k), "k must be dense, its last dimension contiguous, to be overwritten; its strides are ", k.strides());
  TORCH_CHECK_VALUE(at::get_overlap_status(q, k) == at::MemOverlapStatus::No, "k overlaps q: they cannot be overwritten");
}

// What CPU and CUDA do before their kernels.
struct Call {
  Tensor q, k, cos, sin, positions, q_out, k_out;
  kernels::RopeShape shape;
  kernels::RopeTables tables;
  std::array<kernels::RopeTensor, 2> tensors;

  Call(const Tensor& q_in, const Tensor& k_in, const Tensor& cos_in, const Tensor& sin_in, const OptionalTensor& positions_in,
       int64_t rotary_dim, const Style& style, bool in_place) {
    check_tensors(q_in, k_in, style);
    q = with_rows(q_in), k = with_rows(k_in), cos = cos_in.contiguous(), sin = sin_in.contiguous();
    if (positions_in.has_value()) positions = positions_in->contiguous();
    const Dims dims = dims_of(q, style);
    tables = tables_of(cos, sin, positions, dims, q);
    shape = shape_of(dims, rotary_dim, tables.width, style);
    if (in_place) check_in_place(q_in, k_in);
    q_out = in_place ? q : output_for(q_in), k_out = in_place ? k : output_for(k_in);
    tensors = {tensor_of(q, q_out, style), tensor_of(k, k_out, style)};
  }
};

void run_cpu(const Call& call) {
  const auto& tables = call.tables;
  for (int64_t i = 0; tables.positions != nullptr && i < call.positions.numel(); ++i) {
    TORCH_CHECK_VALUE(tables.positions[i] >= 0 && tables.positions[i] < tables.rows, "positions: ", tables.positions[i],
                      " is not a row of cos, which has ", tables.rows);
  }
  const int64_t tokens = call.shape.batch * call.shape.seq;
  const int64_t token_elements = std::max<int64_t>(1, (call.tensors[0].heads + call.tensors[1].heads) * call.shape.dim);
  for_chunks(tokens, std::max<int64_t>(1, 32768 / token_elements), [&](int64_t, int64_t begin, int64_t end) {
    kernels::rope(to_dtype(call.q.scalar_type()), call.shape, tables, call.tensors.data(), 2, begin, end);
  });
}

#ifdef DS_WITH_CUDA
void run_cuda(const Call& call) {
  const OnGpu gpu(call.q);
  kernels::rope(to_dtype(call.q.scalar_type()), call.shape, call.tables, call.tensors.data(), 2, gpu.stream());
}
#endif

template <void (*kRun)(const Call&)>
QK rope(const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin, const OptionalTensor& positions, int64_t rotary_dim,
        bool interleaved, bool heads_first, bool inverse) {
  const Call call(q, k, cos, sin, positions, rotary_dim, {interleaved, heads_first, inverse}, false);
  kRun(call);
  return {call.q_out, call.k_out};
}

template <void (*kRun)(const Call&)>
void rope_(Tensor& q, Tensor& k, const Tensor& cos, const Tensor& sin, const OptionalTensor& positions, int64_t rotary_dim, bool interleaved,
           bool heads_first, bool inverse) {
  kRun(Call(q, k, cos, sin, positions, rotary_dim, {interleaved, heads_first, inverse}, true));
  mark_written(q);
  mark_written(k);
}

QK rope_meta(const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin, const OptionalTensor& positions, int64_t rotary_dim,
             bool interleaved, bool heads_first, bool inverse) {
  TORCH_CHECK_VALUE(q.dim() == 4, "q must have 4 dimensions, its shape is ", q.sym_sizes());
  TORCH_CHECK_VALUE(k.dim() == 4, "k must have 4 dimensions, its shape is ", k.sym_sizes());
  return {output_for(q), output_for(k)};
}

void rope_meta_(Tensor& q, Tensor& k, const Tensor& cos, const Tensor& sin, const OptionalTensor& positions, int64_t rotary_dim,
                bool interleaved, bool heads_first, bool inverse) {}

using InPlace = void(Tensor&, Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, int64_t, bool, bool, bool);
using Signature = QK(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, int64_t, bool, bool, bool);

struct Rope : torch::autograd::Function<Rope> {
  static torch::autograd::variable_list forward(torch::autograd::AutogradContext* ctx, const Tensor& q, const Tensor& k, const Tensor& cos,
                                                const Tensor& sin, const OptionalTensor& positions, int64_t rotary_dim, bool interleaved,
                                                bool heads_first, bool inverse) {
    at::AutoDispatchBelowADInplaceOrView below;
    static const auto op = find_op<Signature>("deepspeed::rope");
    ctx->save_for_backward({cos, sin, positions.has_value() ? *positions : Tensor()});
    ctx->saved_data["rotary_dim"] = rotary_dim;
    ctx->saved_data["interleaved"] = interleaved;
    ctx->saved_data["heads_first"] = heads_first;
    ctx->saved_data["inverse"] = inverse;
    auto [q_out, k_out] = op.call(q, k, cos, sin, positions, rotary_dim, interleaved, heads_first, inverse);
    return {q_out, k_out};
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx, const torch::autograd::variable_list& grads) {
    static const auto op = find_op<Signature>("deepspeed::rope");
    static const auto in_place = find_op<InPlace>("deepspeed::rope_");
    const auto saved = ctx->get_saved_variables();
    const OptionalTensor positions = saved[2].defined() ? OptionalTensor(saved[2]) : std::nullopt;
    const int64_t rotary_dim = ctx->saved_data["rotary_dim"].toInt();
    const bool interleaved = ctx->saved_data["interleaved"].toBool(), heads_first = ctx->saved_data["heads_first"].toBool(),
               inverse = !ctx->saved_data["inverse"].toBool();
    const auto is_free = [](const Tensor& grad) { return may_take(grad) && is_writable(grad); };
    const bool take = is_free(grads[0]) && is_free(grads[1]);
    Tensor dq = grads[0], dk = grads[1];
    if (take) in_place.call(dq, dk, saved[0], saved[1], positions, rotary_dim, interleaved, heads_first, inverse);
    else std::tie(dq, dk) = op.call(dq, dk, saved[0], saved[1], positions, rotary_dim, interleaved, heads_first, inverse);
    return {dq, dk, Tensor(), Tensor(), Tensor(), Tensor(), Tensor(), Tensor(), Tensor()};
  }
};

QK rope_autograd(const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin, const OptionalTensor& positions, int64_t rotary_dim,
                 bool interleaved, bool heads_first, bool inverse) {
  TORCH_CHECK_VALUE(!cos.requires_grad() && !sin.requires_grad(), "cos and sin are taken as constants: detach them");
  const auto out = Rope::apply(q, k, cos, sin, positions, rotary_dim, interleaved, heads_first, inverse);
  return {out[0], out[1]};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(deepspeed, m) {
  m.def("rope(Tensor q, Tensor k, Tensor cos, Tensor sin, Tensor? positions, int rotary_dim, bool interleaved, bool heads_first, "
        "bool inverse) -> (Tensor, Tensor)", {at::Tag::pt2_compliant_tag});
  m.def("rope_(Tensor(a!) q, Tensor(b!) k, Tensor cos, Tensor sin, Tensor? positions, int rotary_dim, bool interleaved, bool heads_first, "
        "bool inverse) -> ()", {at::Tag::pt2_compliant_tag});
}
TORCH_LIBRARY_IMPL(deepspeed, CPU, m) {
  m.impl("rope", rope<run_cpu>);
  m.impl("rope_", rope_<run_cpu>);
}
#ifdef DS_WITH_CUDA
TORCH_LIBRARY_IMPL(deepspeed, CUDA, m) {
  m.impl("rope", rope<run_cuda>);
  m.impl("rope_", rope_<run_cuda>);
}
#endif
TORCH_LIBRARY_IMPL(deepspeed, Meta, m) {
  implement_meta<rope_meta>(m, "rope");
  implement_meta<rope_meta_>(m, "rope_");
}
TORCH_LIBRARY_IMPL(deepspeed, Autograd, m) {
  implement_autograd<rope_autograd>(m, "rope");
  m.impl("rope_", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace ds::ops
