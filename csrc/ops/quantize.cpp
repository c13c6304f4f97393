// SPDX-License-Identifier: Apache-2.0
#include "ops/quantize.h"

#include <ATen/Functions.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <vector>

#include "kernels/quantize/quantize.h"
#include "ops/arguments.h"
#include "ops/derivative.h"
#include "ops/fresh.h"
#include "ops/register.h"

namespace ds::ops {
namespace {

using kernels::Blocks;
using kernels::ConstQuantized;
using kernels::Quantized;
using kernels::QuantFormat;
using kernels::Requantize;
using kernels::Rounding;

constexpr int64_t kChunk = int64_t{1} << 15;  // elements one thread takes at a time

struct FormatName {
  const char* name;
  QuantFormat format;
};
constexpr FormatName kFormats[] = {
    {"int8", QuantFormat::INT8},         {"int4", QuantFormat::INT4},         {"fp8_e4m3", QuantFormat::FP8_E4M3},
    {"fp8_e5m2", QuantFormat::FP8_E5M2}, {"fp6_e3m2", QuantFormat::FP6_E3M2}, {"fp4_e2m1", QuantFormat::FP4_E2M1},
    {"fp12_e4m7", QuantFormat::FP12_E4M7},
};

Blocks to_blocks(std::string_view format, int64_t group_size, bool symmetric, const char* format_name = "format",
                 const char* symmetric_name = "symmetric") {
  constexpr int64_t kLargest = int64_t{1} << 56;  // the sizes of a block are computed from it, also where no block is whole
  TORCH_CHECK_VALUE(group_size >= 1 && group_size <= kLargest, "group_size must be at least 1 and at most 2^56, got ", group_size);
  for (const FormatName& f : kFormats) {
    if (format != f.name) continue;
    TORCH_CHECK_VALUE(symmetric || f.format == QuantFormat::INT8 || f.format == QuantFormat::INT4, symmetric_name,
                      ": only integer formats can be asymmetric, not ", f.name);
    return {f.format, symmetric, group_size};
  }
  std::string names;
  for (const FormatName& f : kFormats) names += std::string(names.empty() ? "" : ", ") + f.name;
  TORCH_CHECK_VALUE(false, format_name, " must be one of ", names, ", not '", format, "'");
}

Rounding to_rounding(bool stochastic, int64_t seed, int64_t offset) {
  TORCH_CHECK_VALUE(offset >= 0 && offset % 4 == 0, "offset must be a multiple of 4 and not negative, got ", offset);
  return {stochastic, static_cast<uint64_t>(seed), static_cast<uint64_t>(offset)};
}

template <typename F>
void for_blocks(const Blocks& b, int64_t n, F&& body) {
  const int64_t together = std::max<int64_t>(1, kChunk / b.group_size);
  for_chunks(kernels::quant_blocks(n, b.group_size), together, [&](int64_t, int64_t first, int64_t last) { body(first, last); });
}

// ---- sizes, also symbolic ------------------------------------------------------------------------------------------

template <typename Int>
Int blocks_of(const Blocks& b, const Int& n) {
  return n / b.group_size + (n % b.group_size + b.group_size - 1) / b.group_size;
}
template <>
int64_t blocks_of(const Blocks& b, const int64_t& n) {
  return kernels::quant_blocks(n, b.group_size);
}
template <typename Int>
Int bytes_of(const Blocks& b, const Int& n) {
  const int bits = kernels::quant_bits(b.format);
  return n / b.group_size * kernels::quant_block_bytes(b.format, b.group_size) + (n % b.group_size * bits + 7) / 8;
}
template <>
int64_t bytes_of(const Blocks& b, const int64_t& n) {
  return kernels::quant_bytes(b, n);
}

// Uninitialised (data, scale, zero_point) for n elements.
QuantizedTensors make_quantized(const Blocks& b, const c10::SymInt& n, const at::TensorOptions& like) {
  const auto options = at::TensorOptions().device(like.device());
  const c10::SymInt blocks = n.maybe_as_int() ? c10::SymInt(blocks_of<int64_t>(b, *n.maybe_as_int())) : blocks_of<c10::SymInt>(b, n);
  const c10::SymInt bytes = n.maybe_as_int() ? c10::SymInt(bytes_of<int64_t>(b, *n.maybe_as_int())) : bytes_of<c10::SymInt>(b, n);
  return {at::empty_symint({bytes}, options.dtype(at::kByte)), at::empty_symint({blocks}, options.dtype(at::kFloat)),
          at::empty_symint({b.symmetric ? c10::SymInt(0) : blocks}, options.dtype(at::kFloat))};
}

Quantized pointers(const Blocks& b, const QuantizedTensors& t) {
  return {std::get<0>(t).mutable_data_ptr<uint8_t>(), std::get<1>(t).mutable_data_ptr<float>(),
          b.symmetric ? nullptr : std::get<2>(t).mutable_data_ptr<float>()};
}

int64_t numel_of(at::IntArrayRef shape) {
  int64_t n = 1;
  for (const int64_t size : shape) {
    TORCH_CHECK_VALUE(size >= 0, "shape: sizes must not be negative, got ", shape);
    TORCH_CHECK_VALUE(!__builtin_mul_overflow(n, size, &n), "shape: ", shape, " has too many elements");
  }
  return n;
}

// One float32 a block.
at::Tensor block_values(const at::Tensor& t, const char* name, const Blocks& b, int64_t n, const at::Tensor& data) {
  TORCH_CHECK_VALUE(t.scalar_type() == at::kFloat && t.layout() == at::kStrided, name, " must be a dense float32 tensor, not ", t.scalar_type());
  check_device(t, name, data, "data");
  const int64_t blocks = blocks_of<int64_t>(b, n);
  TORCH_CHECK_VALUE(t.numel() == blocks, name, " has ", t.numel(), " elements, ", n, " elements in groups of ", b.group_size, " have ", blocks);
  return t.contiguous();
}

// The arrays of one quantised tensor, checked; `kept` owns what had to be copied to be contiguous.
ConstQuantized source(const Blocks& b, int64_t n, const at::Tensor& data, const at::Tensor& scale, const at::Tensor& zero_point,
                      const at::Tensor& like, std::vector<at::Tensor>& kept) {
  TORCH_CHECK_VALUE(data.element_size() == 1 && !data.is_complex() && data.layout() == at::kStrided, "data must be dense bytes, not ",
                    data.scalar_type());
  check_device(data, "data", like, "data[0]");
  TORCH_CHECK_VALUE(data.numel() == bytes_of<int64_t>(b, n), "data has ", data.numel(), " bytes, ", n, " elements in groups of ", b.group_size,
                    " have ", bytes_of<int64_t>(b, n));
  kept.push_back(data.contiguous());
  const auto* bytes = static_cast<const uint8_t*>(kept.back().const_data_ptr());
  kept.push_back(block_values(scale, "scale", b, n, data));
  const auto* scales = kept.back().const_data_ptr<float>();
  if (b.symmetric) return {bytes, scales, nullptr};
  kept.push_back(block_values(zero_point, "zero_point", b, n, data));
  return {bytes, scales, kept.back().const_data_ptr<float>()};
}

bool has_blocks(const at::Tensor& zero_point) { return zero_point.defined() && zero_point.numel() > 0; }

at::ScalarType checked_dtype(at::ScalarType dtype) {
  TORCH_CHECK_VALUE(is_kernel_float(dtype), "dtype must be float32, bfloat16 or float16, not ", dtype);
  return dtype;
}

#ifdef DS_WITH_CUDA
#define DS_QUANT_CUDA(tensor, ...)   \
  if ((tensor).is_cuda()) {          \
    const OnGpu gpu(tensor);         \
    __VA_ARGS__;                     \
  } else
#else
#define DS_QUANT_CUDA(tensor, ...)
#endif

QuantizedTensors run_quantize(const at::Tensor& x, float* residual, const Blocks& b, const Rounding& rounding) {
  const at::Tensor source = x.contiguous();
  const int64_t n = source.numel();
  QuantizedTensors result = make_quantized(b, n, source.options());
  if (n == 0) return result;
  const Quantized out = pointers(b, result);
  const DType dtype = to_dtype(source.scalar_type());
  DS_QUANT_CUDA(source, kernels::quantize(b, rounding, data(source), dtype, residual, n, out, gpu.stream())) {
    for_blocks(b, n, [&](int64_t first, int64_t last) {
      kernels::quantize(b, rounding, data(source), dtype, residual, n, first, last, out);
    });
  }
  return result;
}

void run_reduce(const Blocks& b, const std::vector<ConstQuantized>& sources, float factor, int64_t n, const at::Tensor& out,
                const Requantize* again, const at::Tensor& like) {
  if (n == 0) return;
  const int count = static_cast<int>(sources.size());
  const DType dtype = out.defined() ? to_dtype(out.scalar_type()) : DType::F32;
  DS_QUANT_CUDA(like, kernels::dequantize_reduce(b, sources.data(), count, factor, n, mutable_data(out), dtype, again, gpu.stream())) {
    for_blocks(b, n, [&](int64_t first, int64_t last) {
      kernels::dequantize_reduce(b, sources.data(), count, factor, n, first, last, mutable_data(out), dtype, again);
    });
  }
}

}  // namespace

// ---- operators -----------------------------------------------------------------------------------------------------

QuantizedTensors quantize(const at::Tensor& x, std::string_view format, int64_t group_size, bool symmetric, bool stochastic, int64_t seed,
                          int64_t offset) {
  check_float(x, "x");
  return run_quantize(x, nullptr, to_blocks(format, group_size, symmetric), to_rounding(stochastic, seed, offset));
}

static void check_residual(const at::Tensor& residual, const at::Tensor& x) {
  check_device(residual, "residual", x, "x");
  TORCH_CHECK_VALUE(residual.scalar_type() == at::kFloat, "residual must be float32, not ", residual.scalar_type());
  TORCH_CHECK_VALUE(residual.sym_sizes() == x.sym_sizes(), "residual has shape ", residual.sym_sizes(), ", x ", x.sym_sizes());
}

QuantizedTensors quantize_feedback(const at::Tensor& x, at::Tensor& residual, std::string_view format, int64_t group_size, bool symmetric,
                                   bool stochastic, int64_t seed, int64_t offset) {
  check_float(x, "x");
  check_float(residual, "residual");
  check_residual(residual, x);
  TORCH_CHECK_VALUE(residual.is_contiguous(), "residual must be contiguous: it is written");
  const Blocks b = to_blocks(format, group_size, symmetric);
  TORCH_CHECK_VALUE(!residual.is_alias_of(x), "residual must not share memory with x");
  mark_written(residual);
  return run_quantize(x, residual.mutable_data_ptr<float>(), b, to_rounding(stochastic, seed, offset));
}

at::Tensor dequantize(const at::Tensor& data, const at::Tensor& scale, const std::optional<at::Tensor>& zero_point, at::IntArrayRef shape,
                      std::string_view format, int64_t group_size, std::optional<at::ScalarType> dtype) {
  const at::Tensor zero = value_or_undefined(zero_point);
  const Blocks b = to_blocks(format, group_size, !has_blocks(zero), "format", "zero_point");
  const int64_t n = numel_of(shape);
  std::vector<at::Tensor> kept;
  const std::vector<ConstQuantized> sources = {source(b, n, data, scale, zero, data, kept)};
  const at::Tensor out = fresh(shape, at::TensorOptions().dtype(checked_dtype(dtype.value_or(at::kFloat))).device(data.device()));
  run_reduce(b, sources, 1.0f, n, out, nullptr, data);
  return out;
}

static void check_lists(at::TensorList data, at::TensorList scale, at::TensorList zero_point, bool any_output) {
  TORCH_CHECK_VALUE(!data.empty(), "data: the list is empty");
  TORCH_CHECK_VALUE(scale.size() == data.size(), "scale: ", scale.size(), " tensors for ", data.size(), " of data");
  TORCH_CHECK_VALUE(zero_point.empty() || zero_point.size() == data.size(), "zero_point: ", zero_point.size(), " tensors for ", data.size(),
                    " of data");
  TORCH_CHECK_VALUE(any_output, "dtype and out_format are both absent: nothing to compute");
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> dequantize_reduce(
    at::TensorList data, at::TensorList scale, at::TensorList zero_point, at::IntArrayRef shape, std::string_view format, int64_t group_size,
    double factor, std::optional<at::ScalarType> dtype, std::optional<std::string_view> out_format, bool out_symmetric, bool stochastic,
    int64_t seed, int64_t offset) {
  check_lists(data, scale, zero_point, dtype.has_value() || out_format.has_value());
  TORCH_CHECK_VALUE(!data[0].is_cuda() || data.size() <= kernels::kCudaMaxQuantized, "data: at most ", kernels::kCudaMaxQuantized,
                    " tensors on a GPU, got ", data.size());
  const Blocks b = to_blocks(format, group_size, zero_point.empty(), "format", "zero_point");
  const int64_t n = numel_of(shape);
  std::vector<at::Tensor> kept;
  std::vector<ConstQuantized> sources;
  for (size_t k = 0; k < data.size(); ++k) {
    sources.push_back(source(b, n, data[k], scale[k], zero_point.empty() ? at::Tensor() : zero_point[k], data[0], kept));
  }
  const auto on = at::TensorOptions().device(data[0].device());
  const at::Tensor out = dtype.has_value() ? fresh(shape, on.dtype(checked_dtype(*dtype))) : at::Tensor();
  const Blocks again_blocks = out_format.has_value() ? to_blocks(*out_format, group_size, out_symmetric, "out_format", "out_symmetric") : b;
  const Rounding rounding = to_rounding(stochastic, seed, offset);
  QuantizedTensors result = make_quantized(again_blocks, out_format.has_value() ? n : 0, on);
  const Requantize again{again_blocks.format, again_blocks.symmetric, rounding, pointers(again_blocks, result)};
  run_reduce(b, sources, static_cast<float>(factor), n, out, out_format.has_value() ? &again : nullptr, data[0]);
  return {out.defined() ? out : at::empty({0}, on.dtype(at::kFloat)), std::get<0>(result), std::get<1>(result), std::get<2>(result)};
}

at::Tensor fake_quantize(const at::Tensor& x, std::string_view format, int64_t group_size, bool symmetric, bool stochastic, int64_t seed,
                         int64_t offset) {
  check_float(x, "x");
  const Blocks b = to_blocks(format, group_size, symmetric);
  const Rounding rounding = to_rounding(stochastic, seed, offset);
  const at::Tensor source = x.contiguous();
  const at::Tensor out = fresh_like(source);
  const int64_t n = source.numel();
  if (n == 0) return out;
  const DType dtype = to_dtype(source.scalar_type());
  DS_QUANT_CUDA(source, kernels::fake_quantize(b, rounding, data(source), dtype, n, mutable_data(out), gpu.stream())) {
    for_blocks(b, n, [&](int64_t first, int64_t last) {
      kernels::fake_quantize(b, rounding, data(source), dtype, n, first, last, mutable_data(out));
    });
  }
  return out;
}

// ---- registration --------------------------------------------------------------------------------------------------

namespace {

QuantizedTensors quantize_meta(const at::Tensor& x, std::string_view format, int64_t group_size, bool symmetric, bool stochastic, int64_t seed,
                               int64_t offset) {
  check_float(x, "x");
  to_rounding(stochastic, seed, offset);
  return make_quantized(to_blocks(format, group_size, symmetric), x.sym_numel(), x.options());
}
QuantizedTensors quantize_feedback_meta(const at::Tensor& x, at::Tensor& residual, std::string_view format, int64_t group_size,
                                        bool symmetric, bool stochastic, int64_t seed, int64_t offset) {
  check_residual(residual, x);
  return quantize_meta(x, format, group_size, symmetric, stochastic, seed, offset);
}
at::Tensor dequantize_meta(const at::Tensor& data, const at::Tensor& scale, const std::optional<at::Tensor>& zero_point,
                           c10::SymIntArrayRef shape, std::string_view format, int64_t group_size, std::optional<at::ScalarType> dtype) {
  to_blocks(format, group_size, true);
  return at::empty_symint(shape, data.options().dtype(checked_dtype(dtype.value_or(at::kFloat))));
}
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> dequantize_reduce_meta(
    at::TensorList data, at::TensorList scale, at::TensorList zero_point, c10::SymIntArrayRef shape, std::string_view format,
    int64_t group_size, double factor, std::optional<at::ScalarType> dtype, std::optional<std::string_view> out_format, bool out_symmetric,
    bool stochastic, int64_t seed, int64_t offset) {
  check_lists(data, scale, zero_point, dtype.has_value() || out_format.has_value());
  to_blocks(format, group_size, zero_point.empty(), "format", "zero_point");
  const auto on = data[0].options();
  c10::SymInt n = 1;
  for (const c10::SymInt& size : shape) n = n * size;
  QuantizedTensors again = make_quantized(to_blocks(out_format.value_or("int8"), group_size, out_symmetric, "out_format", "out_symmetric"),
                                          out_format.has_value() ? n : c10::SymInt(0), on);
  const at::Tensor out = dtype.has_value() ? at::empty_symint(shape, on.dtype(checked_dtype(*dtype))) : at::empty({0}, on.dtype(at::kFloat));
  return {out, std::get<0>(again), std::get<1>(again), std::get<2>(again)};
}
at::Tensor fake_quantize_meta(const at::Tensor& x, std::string_view format, int64_t group_size, bool symmetric, bool stochastic, int64_t seed,
                              int64_t offset) {
  check_float(x, "x");
  to_blocks(format, group_size, symmetric);
  to_rounding(stochastic, seed, offset);
  return at::empty_like(x, at::MemoryFormat::Contiguous);
}

// Straight through: the derivative of rounding is taken for 1. (No block clips: its scale is made from its own largest element.)
class StraightThrough : public torch::autograd::Function<StraightThrough> {
 public:
  static at::Tensor forward(torch::autograd::AutogradContext*, const at::Tensor& x, std::string format, int64_t group_size, bool symmetric,
                            bool stochastic, int64_t seed, int64_t offset) {
    at::AutoDispatchBelowADInplaceOrView guard;
    static const auto op = find_op<decltype(fake_quantize)>("deepspeed::fake_quantize");
    return op.call(x, format, group_size, symmetric, stochastic, seed, offset);
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext*, torch::autograd::variable_list grads) {
    return {grads[0], at::Tensor(), at::Tensor(), at::Tensor(), at::Tensor(), at::Tensor(), at::Tensor()};
  }
};
at::Tensor fake_quantize_autograd(const at::Tensor& x, std::string_view format, int64_t group_size, bool symmetric, bool stochastic,
                                  int64_t seed, int64_t offset) {
  return StraightThrough::apply(x, std::string(format), group_size, symmetric, stochastic, seed, offset);
}

#define DS_QUANT_ROUNDING ", bool stochastic=False, int seed=0, int offset=0)"

TORCH_LIBRARY_FRAGMENT(deepspeed, m) {
  m.def("quantize(Tensor x, str format, int group_size, bool symmetric=True" DS_QUANT_ROUNDING
        " -> (Tensor data, Tensor scale, Tensor zero_point)");
  m.def("quantize_feedback(Tensor x, Tensor(a!) residual, str format, int group_size, bool symmetric=True" DS_QUANT_ROUNDING
        " -> (Tensor data, Tensor scale, Tensor zero_point)");
  m.def("dequantize(Tensor data, Tensor scale, Tensor? zero_point, SymInt[] shape, str format, int group_size, ScalarType? dtype=None) -> Tensor");
  m.def("dequantize_reduce(Tensor[] data, Tensor[] scale, Tensor[] zero_point, SymInt[] shape, str format, int group_size, float factor=1.0, "
        "ScalarType? dtype=None, str? out_format=None, bool out_symmetric=True" DS_QUANT_ROUNDING
        " -> (Tensor out, Tensor data, Tensor scale, Tensor zero_point)");
  m.def("fake_quantize(Tensor x, str format, int group_size, bool symmetric=True" DS_QUANT_ROUNDING " -> Tensor");
}

void implement(torch::Library& m) {
  m.impl("quantize", &quantize);
  m.impl("quantize_feedback", &quantize_feedback);
  m.impl("dequantize", &dequantize);
  m.impl("dequantize_reduce", &dequantize_reduce);
  m.impl("fake_quantize", &fake_quantize);
}
TORCH_LIBRARY_IMPL(deepspeed, CPU, m) { implement(m); }
#ifdef DS_WITH_CUDA
TORCH_LIBRARY_IMPL(deepspeed, CUDA, m) { implement(m); }
#endif
TORCH_LIBRARY_IMPL(deepspeed, Meta, m) {
  implement_meta<quantize_meta>(m, "quantize");
  implement_meta<quantize_feedback_meta>(m, "quantize_feedback");
  implement_meta<dequantize_meta>(m, "dequantize");
  implement_meta<dequantize_reduce_meta>(m, "dequantize_reduce");
  implement_meta<fake_quantize_meta>(m, "fake_quantize");
}
TORCH_LIBRARY_IMPL(deepspeed, Autograd, m) {
  implement_autograd<fake_quantize_autograd>(m, "fake_quantize");
  for (const char* name : {"quantize", "quantize_feedback", "dequantize", "dequantize_reduce"}) {
    m.impl(name, torch::CppFunction::makeFallthrough());  // constants to autograd
  }
}

}  // namespace
}  // namespace ds::ops
