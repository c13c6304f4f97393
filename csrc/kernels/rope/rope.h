// SPDX-License-Identifier: Apache-2.0
// Rotary position embedding (Su et al., "RoFormer", 2021) of queries and keys together. Elements are rotated in pairs by the angle of their
// token: pair k is elements (k, k + rotary_dim / 2), the "half" style of NeoX and Llama, or (2 k, 2 k + 1), the interleaved style of GPT-J.
// Elements from rotary_dim on go through unchanged.
//
// Conventions. dtype is F32, BF16 or F16, arithmetic float32. The last dimension is contiguous; batch, sequence and head have strides, in
// elements. Outputs are overwritten and may be the input itself (same strides), never partly overlapping it. Nothing here starts threads:
// callers split the tokens (batch * seq, batch outermost). Tables hold the cosine and sine of each pair's angle, `width` a row: rotary_dim / 2,
// or rotary_dim in the order of the elements; then each element of a pair has its own.
#pragma once

#include <cstdint>

#include "base/dtype.h"

typedef struct CUstream_st* cudaStream_t;

namespace ds::kernels {

struct RopeShape {
  int64_t batch, seq, dim, rotary_dim;
  bool interleaved;
  bool inverse;  // multiply by the transposed rotation, which is the gradient
};

struct RopeTables {
  const void *cos, *sin;  // rows of `width`, contiguous
  DType dtype;            // F32 or that of the tensors
  int64_t width;
  int64_t rows;                // that exist
  int64_t batch_rows;          // token (b, s) uses row b * batch_rows + s, ...
  const int64_t* positions;    // ... or, when given, row positions[b * positions_batch + s]
  int64_t positions_batch;
};

struct RopeTensor {
  const void* in;
  void* out;
  int64_t heads;
  int64_t in_batch, in_seq, in_head;  // strides
  int64_t out_batch, out_seq, out_head;
};

constexpr int kRopeTensors = 2;  // at most: q and k

// Tokens [begin, end). Positions must lie in [0, rows): the caller has looked.
void rope(DType dtype, const RopeShape& shape, const RopeTables& tables, const RopeTensor* tensors, int count, int64_t begin, int64_t end);

// Plain scalar loops in float64, rounded once. Not in place.
void rope_ref(DType dtype, const RopeShape& shape, const RopeTables& tables, const RopeTensor* tensors, int count, int64_t begin, int64_t end);

// CUDA twin (built with DS_CUDA), for all tokens: device pointers, launched on `stream`. A token whose position lies outside the tables becomes
// NaN, since a kernel cannot complain.
void rope(DType dtype, const RopeShape& shape, const RopeTables& tables, const RopeTensor* tensors, int count, cudaStream_t stream);

// The two entries of a table's row that belong to pair k, as both the CPU and the GPU find them.
struct RopeEntry {
  int64_t first, second;
};
#ifdef __CUDACC__
__host__ __device__
#endif
inline RopeEntry rope_entry(const RopeShape& shape, int64_t width, int64_t k) {
  if (width != shape.rotary_dim) return {k, k};
  return shape.interleaved ? RopeEntry{2 * k, 2 * k + 1} : RopeEntry{k, k + shape.rotary_dim / 2};
}

void check_rope(const RopeShape& shape, const RopeTables& tables, const RopeTensor* tensors, int count);

}  // namespace ds::kernels
