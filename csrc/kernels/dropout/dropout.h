// SPDX-License-Identifier: Apache-2.0
// Dropout, bias and residual in one pass: y = residual + dropout(x + bias, p). The mask is never stored: it is a function of (seed, offset,
// element) by philox.h, so the backward pass makes it again, and every device and number of threads makes the same.
//
// Conventions. Arrays are rows of `cols` elements; `dtype` is F32, BF16 or F16, arithmetic float32, the bias float32 on the CPU (nullable).
// Outputs are overwritten and may be the same array as an input. Nothing here starts threads: a caller that splits the rows says with
// `first_row` where its rows lie in the whole, on which the mask depends. Kept elements are scaled by 1 / (1 - p).
#pragma once

#include <cstdint>

#include "base/dtype.h"
#include "kernels/output.h"

typedef struct CUstream_st* cudaStream_t;

namespace ds::kernels {

struct Dropout {
  double p;  // in [0, 1]; 0 draws nothing
  uint64_t seed;
  uint64_t offset;  // see philox.h; one call uses up 4
};

void dropout_add(DType dtype, const void* x, const float* bias, const void* residual, void* y, const Dropout& dropout, int64_t first_row,
                 int64_t rows, int64_t cols);

// dx = the mask times dy; the residual's gradient is dy itself. dbias (nullable) is overwritten with the sum over these rows.
void dropout_add_backward(DType dtype, const void* dy, Output dx, float* dbias, const Dropout& dropout, int64_t first_row, int64_t rows,
                          int64_t cols);

// Plain scalar loops in float64, rounded once.
void dropout_add_ref(DType dtype, const void* x, const float* bias, const void* residual, void* y, const Dropout& dropout,
                     int64_t first_row, int64_t rows, int64_t cols);
void dropout_add_backward_ref(DType dtype, const void* dy, void* dx, float* dbias, const Dropout& dropout, int64_t first_row, int64_t rows,
                              int64_t cols);

// CUDA twins (built with DS_CUDA): device pointers, launched on `stream`. `state` are two int64 on the device, seed and offset, so that a
// captured graph draws anew; the bias is of `dtype` or float32, dbias of bias_dtype, `workspace` as in activation.h.
void dropout_add(DType dtype, const void* x, const void* bias, DType bias_dtype, const void* residual, void* y, double p,
                 const int64_t* state, int64_t rows, int64_t cols, cudaStream_t stream);
void dropout_add_backward(DType dtype, const void* dy, void* dx, void* dbias, DType bias_dtype, double p, const int64_t* state, int64_t rows,
                          int64_t cols, void* workspace, cudaStream_t stream);
// state[0] = seed, state[1] = offset: the values, or what lies at the pointers (plus `offset`) when they are given, as in a captured graph.
void write_philox_state(int64_t* state, uint64_t seed, uint64_t offset, const int64_t* seed_at, const int64_t* offset_at,
                        cudaStream_t stream);

}  // namespace ds::kernels
