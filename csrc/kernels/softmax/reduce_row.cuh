// SPDX-License-Identifier: Apache-2.0
// Teams of threads that own a row: a warp or a block. Their reductions give every thread of the team the same value, added in a fixed order.
#pragma once

#include "kernels/launch.cuh"

namespace ds::kernels::cuda {

struct WarpTeam {
  static constexpr int kSize = 32;
  static int64_t blocks(int64_t rows) { return rows / kPerBlock + (rows % kPerBlock != 0); }
  static __device__ __forceinline__ int64_t row() { return int64_t{blockIdx.x} * kPerBlock + threadIdx.x / kSize; }
  static __device__ __forceinline__ int rank() { return threadIdx.x % kSize; }
  static __device__ __forceinline__ float sum(float x) {
#pragma unroll
    for (int apart = kSize / 2; apart > 0; apart /= 2) x += __shfl_xor_sync(0xffffffffu, x, apart);
    return x;
  }
  static __device__ __forceinline__ float largest(float x) {
#pragma unroll
    for (int apart = kSize / 2; apart > 0; apart /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, apart));
    return x;
  }

 private:
  static constexpr int kPerBlock = kThreads / kSize;
};

struct BlockTeam {
  static constexpr int kSize = kThreads;
  static int64_t blocks(int64_t rows) { return rows; }
  static __device__ __forceinline__ int64_t row() { return blockIdx.x; }
  static __device__ __forceinline__ int rank() { return threadIdx.x; }
  static __device__ __forceinline__ float sum(float x) {
    return join(WarpTeam::sum(x), [](float a, float b) { return a + b; });
  }
  static __device__ __forceinline__ float largest(float x) {
    return join(WarpTeam::largest(x), [](float a, float b) { return fmaxf(a, b); });
  }

 private:
  // Every thread of the block must call.
  template <typename Operation>
  static __device__ __forceinline__ float join(float x, Operation operation) {
    __shared__ float warps[kThreads / 32];
    __syncthreads();  // the array may still be read by the previous call
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = x;
    __syncthreads();
    float all = warps[0];
#pragma unroll
    for (int w = 1; w < kThreads / 32; ++w) all = operation(all, warps[w]);
    return all;
  }
};

// exp(x) for results in a storage format: the fast one errs by far less than a 16-bit format rounds.
template <class T>
__device__ __forceinline__ float exp_for(float x) {
  return sizeof(typename T::Raw) == 2 ? __expf(x) : expf(x);
}

// A thread's running maximum of logits and the sum of exp(z - maximum).
struct OnlineSum {
  float largest = -INFINITY;
  float sum = 0.0f;

  template <int kCount>
  __device__ __forceinline__ void add(const float (&z)[kCount]) {
    float top = largest;
#pragma unroll
    for (int k = 0; k < kCount; ++k) top = fmaxf(top, z[k]);
    sum = sum_at(top);
    largest = top;
    const float shift = top == -INFINITY ? 0.0f : top;
#pragma unroll
    for (int k = 0; k < kCount; ++k) sum += expf(z[k] - shift);  // NaNs, which maxima overlook, stay here
  }
  // The sum as it is beside a maximum of `top` >= largest.
  __device__ __forceinline__ float sum_at(float top) const { return largest == top || largest == -INFINITY ? sum : sum * expf(largest - top); }
};

}  // namespace ds::kernels::cuda
