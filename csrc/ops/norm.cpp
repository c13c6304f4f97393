// SPDX-License-Identifier: Apache-2.0
// The norms on the CPU, and the checks that both devices share.
#include "ops/norm.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <cstring>
#include <vector>

#include "kernels/reduce/reduce.h"
#include "ops/arguments.h"
#include "ops/derivative.h"
#include "ops/float_vector.h"
#include "ops/fresh.h"

namespace ds::ops {
namespace {

using kernels::Norm;

float* mutable_floats(const at::Tensor& t) { return static_cast<float*>(mutable_data(t)); }

int64_t rows_of(const at::Tensor& x) { return x.size(-1) == 0 ? 0 : x.numel() / x.size(-1); }

constexpr int64_t kForwardElements = 1 << 15;  // of a chunk

// Note [Sums over rows]: the gradients of weight and bias are sums over all rows. The kernel adds up some rows, a chunk adds these sums in
// pairs, the chunks are added in order: rounding errors hardly grow with the number of rows. The cuts depend on sizes alone.
constexpr int64_t kSummedRows = 16;

// Rows of a chunk of backward. A chunk has its own sums, so it should have many rows, and there should be few chunks; yet each thread should
// get some.
int64_t backward_rows(int64_t rows, int64_t columns) {
  constexpr int64_t kElements = 1 << 18, kLeast = 8, kMost = 1024, kMaxChunks = 128;
  const int64_t by_size = std::clamp(kElements / columns, kLeast, kMost);
  const int64_t by_count = chunks_of(rows, kMaxChunks);
  return chunks_of(std::max(by_size, by_count), kLeast) * kLeast;
}

// Rows [begin, end), and their sums: [columns] of dweight, then of dbias (layer norm). `spare` has room for such sums for every halving.
void backward_chunk(const kernels::NormBackward& arguments, int64_t begin, int64_t end, float* sums, float* spare) {
  const bool layer = arguments.norm == Norm::Layer;
  const int64_t columns = arguments.columns, stride = columns * (layer ? 2 : 1);
  if (end - begin <= kSummedRows) {
    std::memset(sums, 0, static_cast<size_t>(stride) * sizeof(float));
    kernels::norm_backward(arguments, begin, end, sums, layer ? sums + columns : nullptr);
    return;
  }
  const int64_t half = begin + chunks_of(chunks_of(end - begin, kSummedRows), 2) * kSummedRows;
  backward_chunk(arguments, begin, half, sums, spare);
  backward_chunk(arguments, half, end, spare, spare + stride);
  kernels::accumulate(sums, spare, DType::F32, 1.0f, stride);
}

int64_t halvings(int64_t rows) {
  int64_t count = 0;
  for (int64_t parts = chunks_of(rows, kSummedRows); parts > 1; parts = chunks_of(parts, 2)) ++count;
  return count;
}

// The chunks' sums [chunks, stride], joined in order and rounded to the parameter's dtype.
at::Tensor joined(const at::Tensor& partials, int64_t chunks, int64_t stride, int64_t first, int64_t columns, at::ScalarType dtype) {
  at::Tensor out = at::empty({columns}, partials.options().dtype(dtype));
  const float* sums = floats(partials) + first;
  const at::Tensor wide = dtype == at::kFloat ? out : at::empty({columns}, partials.options());
  constexpr int64_t kColumns = 1 << 12;
  for_chunks(columns, kColumns, [&](int64_t, int64_t begin, int64_t end) {
    std::vector<const void*> sources(static_cast<size_t>(chunks));
    for (int64_t c = 0; c < chunks; ++c) sources[static_cast<size_t>(c)] = sums + c * stride + begin;
    float* sum = mutable_floats(wide) + begin;
    kernels::reduce_sum(sum, sources.data(), static_cast<int>(chunks), DType::F32, 1.0f, false, end - begin, nullptr);
    if (dtype == at::kFloat) return;
    char* narrow = static_cast<char*>(mutable_data(out)) + begin * static_cast<int64_t>(out.element_size());
    kernels::copy_scale(narrow, to_dtype(dtype), sum, DType::F32, 1.0f, end - begin);
  });
  return out;
}

}  // namespace

void check_norm(const NormInputs& in) {
  check_float(in.x, "x");
  TORCH_CHECK_VALUE(in.x.dim() >= 1, "x must have at least one dimension");
  if (in.residual.defined()) check_like(in.residual, "residual", in.x, "x");
  if (in.weight.defined()) check_vector(in.weight, "weight", in.x.size(-1), in.x, "x");
  if (in.bias.defined()) check_vector(in.bias, "bias", in.x.size(-1), in.x, "x");
  if (in.weight.defined() && in.bias.defined()) check_dtype(in.bias, "bias", in.weight, "weight");
  TORCH_CHECK_VALUE(in.eps >= 0.0, "eps must not be negative, got ", in.eps);
}

void check_norm_backward(const NormGradInputs& in) {
  check_float(in.h, "h");
  TORCH_CHECK_VALUE(in.h.dim() >= 1, "h must have at least one dimension");
  check_like(in.dy, "dy", in.h, "h");
  if (in.dh.defined()) check_like(in.dh, "dh", in.h, "h");
  if (in.weight.defined()) check_vector(in.weight, "weight", in.h.size(-1), in.h, "h");
  const auto check_statistic = [&](const at::Tensor& t, const char* name) {
    check_float(t, name);
    check_device(t, name, in.h, "h");
    TORCH_CHECK_VALUE(t.scalar_type() == at::kFloat, name, " is ", t.scalar_type(), ", must be float32");
    check_shape(t, name, in.h.sizes().slice(0, static_cast<size_t>(in.h.dim() - 1)));
  };
  check_statistic(in.rstd, "rstd");
  if (in.norm == Norm::Layer) check_statistic(in.mean, "mean");
  if (in.parameter_dtype.has_value()) {
    TORCH_CHECK_VALUE(is_kernel_float(*in.parameter_dtype), "parameter_dtype must be float32, bfloat16 or float16, not ",
                      *in.parameter_dtype);
  }
}

Normed norm_forward_cpu(const NormInputs& in) {
  check_norm(in);
  const at::Tensor x = in.x.contiguous();
  const at::Tensor residual = in.residual.defined() ? in.residual.contiguous() : at::Tensor();
  const at::Tensor weight = float_vector(in.weight, in.weight_offset), bias = float_vector(in.bias);
  const int64_t columns = x.size(-1);
  const auto statistic = [&] {
    const at::IntArrayRef leading = x.sizes().slice(0, static_cast<size_t>(x.dim() - 1));
    const auto options = x.options().dtype(at::kFloat);
    return columns == 0 ? at::zeros(leading, options) : at::empty(leading, options);
  };
  Normed out{at::empty(x.sizes(), x.options()), residual.defined() ? at::empty(x.sizes(), x.options()) : at::Tensor(),
             in.norm == Norm::Layer ? statistic() : at::Tensor(), statistic()};
  const kernels::NormForward arguments{in.norm, to_dtype(x.scalar_type()), columns, static_cast<float>(in.eps), data(x), data(residual),
                                       floats(weight), floats(bias), mutable_data(out.h), mutable_data(out.y), mutable_floats(out.mean),
                                       mutable_floats(out.rstd)};
  const int64_t chunk = std::max<int64_t>(1, kForwardElements / std::max<int64_t>(1, columns));
  for_chunks(rows_of(x), chunk, [&](int64_t, int64_t begin, int64_t end) { kernels::norm_forward(arguments, begin, end); });
  return out;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> norm_backward_cpu(const NormGradInputs& in) {
  check_norm_backward(in);
  const at::Tensor dy = in.dy.contiguous(), h = in.h.contiguous(), mean = in.norm == Norm::Layer ? in.mean.contiguous() : at::Tensor();
  const at::Tensor dh = in.dh.defined() ? in.dh.contiguous() : at::Tensor(), rstd = in.rstd.contiguous();
  const at::Tensor weight = float_vector(in.weight, in.weight_offset);
  const int64_t rows = rows_of(h), columns = h.size(-1);
  const at::Tensor dx = in.in_place ? taken(in.dy, "dy", {h, dh, weight, mean, rstd}) : at::empty(h.sizes(), h.options());
  const auto parameters = h.options().dtype(in.parameter_dtype.value_or(at::kFloat));
  const bool wanted = in.parameter_dtype.has_value(), layer = in.norm == Norm::Layer;
  const kernels::NormBackward arguments{in.norm, to_dtype(h.scalar_type()), columns, data(dy), data(dh), data(h), floats(weight),
                                        floats(mean), floats(rstd), mutable_data(dx), !in.in_place && is_past_caches(dx)};
  if (rows == 0) {
    const at::Tensor none = at::zeros({wanted ? columns : 0}, parameters);
    return {dx, none, layer ? none.clone() : at::Tensor()};
  }
  const int64_t chunk = backward_rows(rows, columns), chunks = chunks_of(rows, chunk), stride = columns * (layer ? 2 : 1);
  if (!wanted) {
    for_chunks(rows, chunk, [&](int64_t, int64_t begin, int64_t end) { kernels::norm_backward(arguments, begin, end, nullptr, nullptr); });
    return {dx, at::empty({0}, parameters), layer ? at::empty({0}, parameters) : at::Tensor()};
  }
  const at::Tensor partials = at::empty({chunks, stride}, h.options().dtype(at::kFloat));
  for_chunks(rows, chunk, [&](int64_t index, int64_t begin, int64_t end) {
    const at::Tensor spare = at::empty({stride * halvings(end - begin)}, partials.options());
    backward_chunk(arguments, begin, end, mutable_floats(partials) + index * stride, mutable_floats(spare));
  });
  const at::ScalarType dtype = *in.parameter_dtype;
  const at::Tensor dweight = joined(partials, chunks, stride, 0, columns, dtype);
  return {dx, dweight, layer ? joined(partials, chunks, stride, columns, columns, dtype) : at::Tensor()};
}

}  // namespace ds::ops
