// SPDX-License-Identifier: Apache-2.0
// Activations of a linear layer's output, with its bias: y = act(x + bias) and the gated y = act(gate + gate_bias) * (up + up_bias).
//
// Conventions. Arrays are rows of `cols` elements; `dtype` is F32, BF16 or F16, arithmetic float32, biases float32 on the CPU. Pointers need
// only their element's natural alignment. Outputs are overwritten and may be the same array as an input of the same shape, never partly
// overlapping it. Nothing here starts threads: callers split rows. The backward functions read the forward's inputs and nothing else.
// `dbias` pointers are nullable; given, they are overwritten with the float32 sum over these rows: a caller that cuts the rows at fixed places
// and adds the parts in order has the same bits for any number of threads.
//
// SiLU: Elfwing et al. 2018; GELU and its tanh form: Hendrycks and Gimpel 2016; the gated ones: Shazeer, "GLU variants improve Transformer", 2020.
#pragma once

#include <cstdint>

#include "base/dtype.h"
#include "kernels/output.h"

typedef struct CUstream_st* cudaStream_t;

namespace ds::kernels {

enum class Activation { GeluErf, GeluTanh, Silu, Relu };

// y[r][c] = act(x[r][c] + bias[c]); `bias` is nullable.
void bias_act(Activation act, DType dtype, const void* x, const float* bias, Output y, int64_t rows, int64_t cols);

// dx = dy * act'(x + bias).
void bias_act_backward(Activation act, DType dtype, const void* dy, const void* x, const float* bias, Output dx, float* dbias, int64_t rows,
                       int64_t cols);

// The two inputs; rows of both lie `stride` elements apart (cols for two tensors, 2 * cols for the halves of one). The biases are nullable
// together.
struct GatedInput {
  const void* gate;
  const void* up;
  int64_t stride;
  const float* gate_bias;
  const float* up_bias;
};

// y[r][c] = act(gate + gate_bias) * (up + up_bias); rows of y are cols apart.
void gated(Activation act, DType dtype, const GatedInput& in, void* y, int64_t rows, int64_t cols);

// Both gradients, in rows `stride` elements apart, in one pass. The sums are nullable together.
struct GatedGrads {
  void* gate;
  void* up;
  int64_t stride;
  float* gate_bias;
  float* up_bias;
};
void gated_backward(Activation act, DType dtype, const GatedInput& in, const void* dy, const GatedGrads& out, int64_t rows, int64_t cols);

// Plain scalar loops in float64, rounded once: the oracle of the tests.
void bias_act_ref(Activation act, DType dtype, const void* x, const float* bias, void* y, int64_t rows, int64_t cols);
void bias_act_backward_ref(Activation act, DType dtype, const void* dy, const void* x, const float* bias, void* dx, float* dbias,
                           int64_t rows, int64_t cols);
void gated_ref(Activation act, DType dtype, const GatedInput& in, void* y, int64_t rows, int64_t cols);
void gated_backward_ref(Activation act, DType dtype, const GatedInput& in, const void* dy, const GatedGrads& out, int64_t rows, int64_t cols);

// act(x) and act'(x) in float64.
double activation_value(Activation act, double x);
double activation_slope(Activation act, double x);

// CUDA twins (built with DS_CUDA): device pointers, launched on `stream`, nothing waits. Biases are of `dtype` or float32 (bias_dtype), and so
// are the sums that come out. `workspace` holds cuda_bias_sums_bytes(rows, number of summed columns) when a sum is wanted, else it is unused.
int64_t cuda_bias_sums_bytes(int64_t rows, int64_t summed_cols);
struct CudaGatedInput {
  const void* gate;
  const void* up;
  int64_t stride;
  const void* bias;  // [2 * cols], gate's half first; nullable
  DType bias_dtype;
};
void bias_act(Activation act, DType dtype, const void* x, const void* bias, DType bias_dtype, void* y, int64_t rows, int64_t cols,
              cudaStream_t stream);
void bias_act_backward(Activation act, DType dtype, const void* dy, const void* x, const void* bias, DType bias_dtype, void* dx, void* dbias,
                       int64_t rows, int64_t cols, void* workspace, cudaStream_t stream);
void gated(Activation act, DType dtype, const CudaGatedInput& in, void* y, int64_t rows, int64_t cols, cudaStream_t stream);
// dgate and dup in rows `grad_stride` apart; dbias [2 * cols] or null.
void gated_backward(Activation act, DType dtype, const CudaGatedInput& in, const void* dy, void* dgate, void* dup, int64_t grad_stride,
                    void* dbias, int64_t rows, int64_t cols, void* workspace, cudaStream_t stream);

}  // namespace ds::kernels
