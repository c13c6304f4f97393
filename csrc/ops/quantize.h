// SPDX-License-Identifier: Apache-2.0
// Blockwise quantisation of tensors: kernels/quantize/quantize.h over torch's threads and streams. x is taken as a flat array in the order of its
// elements. A quantised tensor is (data uint8[bytes], scale float32[blocks], zero_point float32[blocks], or [0] if symmetric).
// `format`: int8, int4, fp8_e4m3, fp8_e5m2, fp6_e3m2, fp4_e2m1, fp12_e4m7. No bit depends on the number of threads.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>
#include <tuple>

namespace ds::ops {

using QuantizedTensors = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

QuantizedTensors quantize(const at::Tensor& x, std::string_view format, int64_t group_size, bool symmetric, bool stochastic, int64_t seed,
                          int64_t offset);

// Quantises x + residual; residual (float32, x's shape, contiguous) becomes what was lost.
QuantizedTensors quantize_feedback(const at::Tensor& x, at::Tensor& residual, std::string_view format, int64_t group_size, bool symmetric,
                                   bool stochastic, int64_t seed, int64_t offset);

// zero_point: absent or of size 0 for symmetric blocks. dtype: float32 if absent.
at::Tensor dequantize(const at::Tensor& data, const at::Tensor& scale, const std::optional<at::Tensor>& zero_point, at::IntArrayRef shape,
                      std::string_view format, int64_t group_size, std::optional<at::ScalarType> dtype);

// factor * the sum over the list, in its order: as a tensor of `dtype` (absent: not wanted, size 0), and quantised to `out_format` (likewise).
// zero_point: one each, or an empty list for symmetric blocks.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> dequantize_reduce(
    at::TensorList data, at::TensorList scale, at::TensorList zero_point, at::IntArrayRef shape, std::string_view format, int64_t group_size,
    double factor, std::optional<at::ScalarType> dtype, std::optional<std::string_view> out_format, bool out_symmetric, bool stochastic,
    int64_t seed, int64_t offset);

// x quantised and read back, in x's dtype; the gradient passes as it is (straight through).
at::Tensor fake_quantize(const at::Tensor& x, std::string_view format, int64_t group_size, bool symmetric, bool stochastic, int64_t seed,
                         int64_t offset);

}  // namespace ds::ops
