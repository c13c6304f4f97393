// SPDX-License-Identifier: Apache-2.0
// Elementwise sums, casts and norms over contiguous slices.
//
// Conventions. Pointers need only their element's natural alignment; dst may be the same array as a source (never
// partly overlapping it). Float dtypes are F32, F16 and BF16; anything else throws. Nothing here starts threads: callers split ranges.
// Every instruction set writes the same bits, because no multiply is contracted into an add.
//
// Note [statistics]. stats[0] is the sum of squares of the float32 values, stats[1] how many are not finite (then
// stats[0] is inf or NaN). Squares of floats are exact in double; element i is added to lane i mod 16, the lanes are
// added pairwise at the end. So for a given n the bits depend neither on alignment nor on the instruction set. A caller that splits a
// range at fixed chunk borders and adds the chunks' stats in order has the same bits for any number of threads.
#pragma once

#include <cstdint>

#include "base/dtype.h"

typedef struct CUstream_st* cudaStream_t;

namespace ds::kernels {

// dst[i] = (accumulate ? dst[i] + : ) scale * ((src[0][i] + src[1][i]) + src[2][i] + ...), summed in float32, in the
// order of `src`. nsrc >= 1. `stats` (nullable) is overwritten with the statistics of the values written.
void reduce_sum(float* dst, const void* const* src, int nsrc, DType src_dt, float scale, bool accumulate, int64_t n, double* stats);

// dst = cast(scale * float(src)), rounded to nearest even; the bytes as they are when the dtypes agree and scale is 1.
void copy_scale(void* dst, DType dst_dt, const void* src, DType src_dt, float scale, int64_t n);

// dst += scale * float(src).
void accumulate(float* dst, const void* src, DType src_dt, float scale, int64_t n);

// Index of the first inf or NaN, -1 if there is none.
int64_t first_nonfinite(const void* src, DType src_dt, int64_t n);

// Overwrites `stats` with the statistics of x.
void sum_squares(const void* x, DType dt, int64_t n, double* stats);
inline void sum_squares(const float* x, int64_t n, double* stats) { sum_squares(x, DType::F32, n, stats); }

// Plain scalar loops with the same results bit for bit: the oracle of the tests.
void reduce_sum_ref(float* dst, const void* const* src, int nsrc, DType src_dt, float scale, bool accumulate, int64_t n, double* stats);
void copy_scale_ref(void* dst, DType dst_dt, const void* src, DType src_dt, float scale, int64_t n);
void accumulate_ref(float* dst, const void* src, DType src_dt, float scale, int64_t n);
int64_t first_nonfinite_ref(const void* src, DType src_dt, int64_t n);
void sum_squares_ref(const void* x, DType dt, int64_t n, double* stats);

// CUDA twins (built with DS_CUDA): same elements, launched on `stream`, nothing waits. Array pointers are device pointers; `src` itself is
// a host array of device pointers, at most kCudaMaxSources. `stats` and the result of first_nonfinite live on the device; the partition of
// the statistics depends on n alone, so they repeat bit for bit. `workspace` holds kCudaReduceWorkspaceBytes (unused if stats is null).
constexpr int kCudaMaxSources = 64;
constexpr int64_t kCudaReduceWorkspaceBytes = 1024 * 2 * sizeof(double);
void reduce_sum(float* dst, const void* const* src, int nsrc, DType src_dt, float scale, bool accumulate, int64_t n, double* stats,
                void* workspace, cudaStream_t stream);
void copy_scale(void* dst, DType dst_dt, const void* src, DType src_dt, float scale, int64_t n, cudaStream_t stream);
void accumulate(float* dst, const void* src, DType src_dt, float scale, int64_t n, cudaStream_t stream);
void first_nonfinite(const void* src, DType src_dt, int64_t n, int64_t* index, cudaStream_t stream);
void sum_squares(const float* x, int64_t n, double* stats, void* workspace, cudaStream_t stream);

}  // namespace ds::kernels
