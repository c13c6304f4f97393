// SPDX-License-Identifier: Apache-2.0
// y = softmax(scale * x + mask) of every row, and its gradient dx = scale * y * (dy - sum(dy * y)).
//
// x, y, dy, dx: [rows, columns], rows one after the other, all of one storage format; any alignment. Arithmetic is float32 (float64 in the
// reference). Outputs are overwritten; y may be x, and dx may be dy or y. Nothing is owned, nothing starts threads: calls take rows
// [begin, end), and a row's bits do not depend on the cut.
//
// Hidden elements (a mask of -inf, a true one of a boolean mask, the keys after a causal row's own) get 0. A row whose elements are all
// hidden, or all -inf, is 0 and so is its gradient; a NaN or +inf makes the whole row NaN (what causality hides stays 0).
// Results below 1.8e-38 times the row's largest may be 0.
#pragma once

#include <cstdint>

#include "base/dtype.h"

typedef struct CUstream_st* cudaStream_t;

namespace ds::kernels {

// A mask seen through strides, so that a broadcast one is not copied. Row r of x is (i0, i1, ...) in row-major order of `sizes`; its mask
// begins at data + sum(i * stride) and lies one element after the other. F32, BF16 and F16 are added, BOOL hides where it is not 0.
struct MaskView {
  static constexpr int kMaxDims = 6;
  const void* data = nullptr;  // null: no mask
  DType dtype = DType::F32;
  int dims = 0;
  int64_t sizes[kMaxDims] = {};
  int64_t strides[kMaxDims] = {};  // in elements; 0 repeats
};

struct SoftmaxRows {
  int64_t columns = 0;
  float scale = 1.0f;
  int64_t queries = 0;  // causal: how many rows make one matrix, whose last row sees every column; 0: not causal
  bool past_caches = false;  // CPU, of dx: see output.h
  bool from_memory = false;  // CPU, of dy and y: see output.h
};

#ifdef __CUDACC__
#define DS_SOFTMAX_BOTH __host__ __device__ inline
#else
#define DS_SOFTMAX_BOTH inline
#endif

// How many leading columns row `row` may see.
DS_SOFTMAX_BOTH int64_t visible_columns(const SoftmaxRows& s, int64_t row) {
  if (s.queries == 0) return s.columns;
#ifdef __CUDA_ARCH__  // where 64 bits are divided by some hundred instructions
  const int64_t query = (row | s.queries) >> 32 == 0 ? static_cast<uint32_t>(row) % static_cast<uint32_t>(s.queries) : row % s.queries;
#else
  const int64_t query = row % s.queries;
#endif
  const int64_t visible = query + 1 + s.columns - s.queries;  // at most s.columns
  return visible < 0 ? 0 : visible;
}

DS_SOFTMAX_BOTH int64_t mask_offset(const MaskView& m, int64_t row) {
  int64_t offset = 0;
#ifdef __CUDA_ARCH__
  if (row >> 31 == 0) {  // see above
    auto left = static_cast<uint32_t>(row);
#pragma unroll
    for (int d = MaskView::kMaxDims - 1; d >= 0; --d) {
      if (d >= m.dims) continue;
      const uint32_t size = m.sizes[d] > UINT32_MAX ? UINT32_MAX : static_cast<uint32_t>(m.sizes[d]), rest = left / size;
      offset += (left - rest * size) * m.strides[d];
      left = rest;
    }
    return offset;
  }
#pragma unroll  // indices that are constants: the view stays where the kernel's arguments are
#endif
  for (int d = MaskView::kMaxDims - 1; d >= 0; --d) {
    if (d >= m.dims) continue;
    offset += row % m.sizes[d] * m.strides[d];
    row /= m.sizes[d];
  }
  return offset;
}

void softmax(void* y, const void* x, DType dtype, const SoftmaxRows& s, const MaskView& mask, int64_t begin, int64_t end);
// dx may be dy.
void softmax_backward(void* dx, const void* dy, const void* y, DType dtype, const SoftmaxRows& s, int64_t begin, int64_t end);

// Plain scalar loops in float64: the oracle of the tests.
void softmax_ref(void* y, const void* x, DType dtype, const SoftmaxRows& s, const MaskView& mask, int64_t begin, int64_t end);
void softmax_backward_ref(void* dx, const void* dy, const void* y, DType dtype, const SoftmaxRows& s, int64_t begin, int64_t end);

// CUDA twins (built with DS_CUDA): device pointers, all rows [0, rows), launched on `stream`; nothing waits.
void softmax(void* y, const void* x, DType dtype, const SoftmaxRows& s, const MaskView& mask, int64_t rows, cudaStream_t stream);
void softmax_backward(void* dx, const void* dy, const void* y, DType dtype, const SoftmaxRows& s, int64_t rows, cudaStream_t stream);

}  // namespace ds::kernels
