// SPDX-License-Identifier: Apache-2.0
// What the CUDA norms share: teams of threads that own a row, the rows they keep, weights and biases.
#pragma once

#include "kernels/norm/norm.h"
#include "kernels/row_tiles.cuh"

namespace ds::kernels::cuda {

// kSize threads, a warp or a block, that own a row.
template <int kSize>
struct Team {
  static_assert(kSize == 32 || kSize % kThreads == 0);
  static constexpr int kBlock = kSize == 32 ? kThreads : kSize;  // threads of a block
  static constexpr int kRows = kBlock / kSize;                   // of a block
  static int64_t blocks(int64_t rows) { return (rows + kRows - 1) / kRows; }
  static __device__ __forceinline__ int rank() { return threadIdx.x % kSize; }
  static __device__ __forceinline__ int64_t row() { return int64_t{blockIdx.x} * kRows + threadIdx.x / kSize; }
  // x[i] = the team's sums of x[i], in every thread, added in a fixed order. All threads of a warp must call, of a block if that is the team.
  template <int kCount>
  static __device__ __forceinline__ void sum(float2 (&x)[kCount]) {
#pragma unroll
    for (int apart = 16; apart > 0; apart /= 2) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        x[i].x += __shfl_xor_sync(0xffffffffu, x[i].x, apart);
        x[i].y += __shfl_xor_sync(0xffffffffu, x[i].y, apart);
      }
    }
    if constexpr (kSize > 32) {
      __shared__ float2 warps[kSize / 32][kCount];
      __syncthreads();  // the array may still be read by the previous call
      if (threadIdx.x % 32 == 0) {
#pragma unroll
        for (int i = 0; i < kCount; ++i) warps[threadIdx.x / 32][i] = x[i];
      }
      __syncthreads();
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        x[i] = warps[0][i];
#pragma unroll
        for (int w = 1; w < kSize / 32; ++w) {
          x[i].x += warps[w][i].x;
          x[i].y += warps[w][i].y;
        }
      }
    }
  }
  static __device__ __forceinline__ float2 sum(float a, float b) {
    float2 x[1] = {make_float2(a, b)};
    sum(x);
    return x[0];
  }
};

// A thread's part of a row: vectors rank, rank + kSize, ... of 16 bytes, kept in registers.
template <class T, int kSize, int kVectors>
struct CachedRow {
  static constexpr int kVec = kVecOf<T>;
  Packed<kVec, T> vectors[kVectors];

  __device__ __forceinline__ void load(const typename T::Raw* row, int64_t n) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int64_t i = at(v);
      if (i < n) vectors[v].load(row + i);
    }
  }
  __device__ __forceinline__ void keep_packed() {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) vectors[v].keep_packed();
  }
  static __device__ __forceinline__ int64_t at(int v) { return (int64_t{v} * kSize + Team<kSize>::rank()) * kVec; }
  // body(v, i) for every vector v within the row; i is the column it begins at
  template <class Body>
  __device__ __forceinline__ void each(int64_t n, const Body& body) const {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int64_t i = at(v);
      if (i < n) body(v, i);
    }
  }
};

template <int kVec, class T>
__device__ __forceinline__ void load_parameter(T tag, const void* p, bool is_f32, float absent, int64_t i, float (&x)[kVec]) {
  if (p == nullptr) {
#pragma unroll
    for (int k = 0; k < kVec; ++k) x[k] = absent;
  } else if (is_f32) {
    constexpr int kPart = kVec < 4 ? kVec : 4;
#pragma unroll
    for (int part = 0; part < kVec; part += kPart) {
      float four[kPart];
      load_vector<kPart>(F32{}, static_cast<const float*>(p) + i + part, four);
#pragma unroll
      for (int k = 0; k < kPart; ++k) x[part + k] = four[k];
    }
  } else {
    load_vector<kVec>(tag, static_cast<const typename T::Raw*>(p) + i, x);
  }
}

// The weight of the vector at i, with its offset; ones where it is absent.
template <int kVec, class T>
__device__ __forceinline__ void load_weight(T tag, const NormParameters& p, int64_t i, float (&weight)[kVec]) {
  load_parameter<kVec>(tag, p.weight, p.dtype == DType::F32, 1.0f, i, weight);
  if (p.weight != nullptr && p.offset != 0.0f) {
#pragma unroll
    for (int k = 0; k < kVec; ++k) weight[k] += p.offset;
  }
}

template <int kSize, int kVectors>
struct Shape {
  static constexpr int size = kSize, vectors = kVectors;
};

// f(Shape) for the smallest team and number of vectors that hold a row of `vectors` vectors; false if none does.
template <int kMost, class F>
bool with_shape(int64_t vectors, const F& f) {
  if (vectors <= 32) return f(Shape<32, 1>()), true;
  if (vectors <= 64) return f(Shape<32, 2>()), true;
  if (vectors <= 128) return f(Shape<32, 4>()), true;
  if (vectors <= kThreads) return f(Shape<kThreads, 1>()), true;
  if (vectors <= 2 * kThreads) return f(Shape<kThreads, 2>()), true;
  if (vectors <= 4 * kThreads) return f(Shape<kThreads, 4>()), true;
  if (vectors <= 8 * kThreads) return f(Shape<kThreads, 8>()), true;
  if constexpr (kMost >= 16) {
    if (vectors <= 16 * kThreads) return f(Shape<kThreads, 16>()), true;
  }
  return false;
}

template <class F>
void with_norm(Norm norm, const F& f) {
  norm == Norm::Layer ? f(std::integral_constant<Norm, Norm::Layer>()) : f(std::integral_constant<Norm, Norm::Rms>());
}

// The most vectors a thread keeps: 16384 elements a block.
template <class T>
constexpr int kMostVectors = std::is_same_v<T, F32> ? 16 : 8;

inline void check_parameters(const NormParameters& p, DType dtype) {
  DS_CHECK_VALUE(p.dtype == dtype || p.dtype == DType::F32, "weight: dtype must be that of x or F32, not " << dtype_name(p.dtype));
}

}  // namespace ds::kernels::cuda
