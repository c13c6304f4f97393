// SPDX-License-Identifier: Apache-2.0
// Layer norm (Ba et al. 2016) and RMS norm (Zhang, Sennrich 2019) of the rows of a contiguous [rows, columns] matrix, with an optional
// residual that is added first.
//
// Conventions. x, residual, h, y and their gradients share one dtype (F32, F16 or BF16); weight, bias and statistics are float32. Pointers
// need only their element's natural alignment. Outputs may not overlap inputs, except that h may be x or residual, y may be x or residual if
// that is not h, and dx may be dy or dh. A row's y does not depend on the range it is computed in; the last bits of dx do, so callers keep
// the ranges fixed. Rows of no columns leave all outputs alone. Nothing here starts threads: callers split the rows.
//
// Note [precision]. Arithmetic is float32 and what is narrower is rounded once, when written; h is rounded first and it is the rounded h
// that is normalised, so that backward, which reads h, sees the same numbers. The mean is taken in two steps: a float32 number near it,
// then the mean of the differences from that, which are exact where it matters. Rows far from zero therefore lose nothing: neither in the
// variance nor by rounding the mean. Backward reads the rounded mean.
#pragma once

#include <cstdint>

#include "base/dtype.h"

typedef struct CUstream_st* cudaStream_t;

namespace ds::kernels {

enum class Norm { Layer, Rms };

struct NormForward {
  Norm norm;
  DType dtype;
  int64_t columns;
  float eps;
  const void* x;
  const void* residual;  // null: h is x
  const float* weight;   // [columns]; null: ones
  const float* bias;     // [columns]; null: zeros; of layer norm only
  void* h;               // x + residual; only written with a residual
  void* y;               // (h - mean) * rstd * weight + bias; RMS norm: h * rstd * weight
  float* mean;           // [rows], of layer norm only
  float* rstd;           // [rows]: 1 / sqrt(variance + eps); RMS norm: 1 / sqrt(mean of squares + eps)
};

struct NormBackward {
  Norm norm;
  DType dtype;
  int64_t columns;
  const void* dy;
  const void* dh;       // gradient of h from elsewhere, added to dx; null: none
  const void* h;        // what was normalised: x without a residual
  const float* weight;  // as in forward
  const float* mean;
  const float* rstd;
  void* dx;  // with a residual: the gradient of both summands
  bool past_caches = false;  // CPU, of dx: see kernels/output.h
};

// Rows [begin, end). dweight and dbias: [columns], added to. Layer norm takes both or neither, RMS norm has no dbias.
void norm_forward(const NormForward& a, int64_t begin, int64_t end);
void norm_backward(const NormBackward& a, int64_t begin, int64_t end, float* dweight, float* dbias);

// Plain scalar loops in double: the oracle of the tests.
void norm_forward_ref(const NormForward& a, int64_t begin, int64_t end);
void norm_backward_ref(const NormBackward& a, int64_t begin, int64_t end, float* dweight, float* dbias);

// CUDA twins (built with DS_CUDA): rows [0, rows) in device memory, launched on `stream`; nothing waits. weight and bias are those of
// NormParameters, in its dtype, and `offset` is added to weight; the fields of that name in NormForward and NormBackward are not read.
struct NormParameters {
  const void* weight;
  const void* bias;
  DType dtype;
  float offset;
};
void norm_forward(const NormForward& a, const NormParameters& parameters, int64_t rows, cudaStream_t stream);
void norm_backward(const NormBackward& a, const NormParameters& parameters, int64_t rows, cudaStream_t stream);

// The gradients of weight and, behind it, of bias (layer norm): overwrites `out`, [columns] or [2 * columns] of `dtype`. The workspace
// holds cuda_norm_sums_bytes. Parts of the sums are cut by the sizes alone and joined in order, so the bits repeat.
struct ParameterGradients {
  void* out;
  DType dtype;
  void* workspace;
};
int64_t cuda_norm_sums_bytes(Norm norm, int64_t rows, int64_t columns);
// Those and dx: in one pass over dy and h where registers hold a row, else in two.
void norm_backward(const NormBackward& a, const NormParameters& parameters, int64_t rows, const ParameterGradients& gradients,
                   cudaStream_t stream);

}  // namespace ds::kernels
