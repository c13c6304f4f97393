// SPDX-License-Identifier: Apache-2.0
// Stands in for CUDA's own header of this name, so that a C++ compiler builds csrc/kernels/*.cu and the host runs them: as many of CUDA's
// names as the kernels use, and no more. Threads are those of grid.h; shared memory is static, because blocks run one after the other.
#pragma once

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#include "grid.h"

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline double2 make_double2(double x, double y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

// ---- the runtime ---------------------------------------------------------------------------------------------------

#define CUDART_VERSION 13000
enum cudaError_t { cudaSuccess = 0 };
enum cudaMemcpyKind { cudaMemcpyDeviceToDevice };
typedef struct CUstream_st* cudaStream_t;

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorName(cudaError_t) { return "cudaSuccess"; }
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  std::memmove(to, from, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* to, int byte, size_t bytes, cudaStream_t) {
  std::memset(to, byte, bytes);
  return cudaSuccess;
}

namespace host_cuda {
template <class... Parameters, size_t... kIndex>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, void** arguments, std::index_sequence<kIndex...>) {
  run_grid(grid, block, [&] { kernel(*static_cast<std::remove_const_t<Parameters>*>(arguments[kIndex])...); });
}
}  // namespace host_cuda

template <class... Parameters>
cudaError_t cudaLaunchKernel(void (*kernel)(Parameters...), dim3 grid, dim3 block, void** arguments, size_t, cudaStream_t) {
  host_cuda::launch(kernel, grid, block, arguments, std::index_sequence_for<Parameters...>());
  return cudaSuccess;
}

// ---- a warp's exchanges, and what threads do to one place ------------------------------------------------------------

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  return host_cuda::exchange(mask, value, host_cuda::lane() ^ lanes);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, int lanes) {
  const int from = host_cuda::lane() + lanes;
  return host_cuda::exchange(mask, value, from < host_cuda::kLanes ? from : host_cuda::lane());
}
inline void __syncthreads() { host_cuda::wait_for_block(); }
template <class T>
T atomicMin(T* at, T value) {
  const T old = *at;
  if (value < old) *at = value;
  return old;
}

// ---- arithmetic ------------------------------------------------------------------------------------------------------
// Built without contraction of a * b + c, so an operator rounds as __fmul_rn and its kin do.

inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float x) { return std::exp(x); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float normcdff(float x) { return static_cast<float>(0.5 * std::erfc(-0.70710678118654752440 * static_cast<double>(x))); }
using std::isfinite;

template <class To, class From>
To host_cuda_bits(From x) {
  static_assert(sizeof(To) == sizeof(From), "a reinterpretation");
  To to;
  std::memcpy(&to, &x, sizeof(to));
  return to;
}
inline float __uint_as_float(unsigned x) { return host_cuda_bits<float>(x); }
inline float __int_as_float(int x) { return host_cuda_bits<float>(x); }
inline unsigned __float_as_uint(float x) { return host_cuda_bits<unsigned>(x); }
inline int __float_as_int(float x) { return host_cuda_bits<int>(x); }

template <class T>
T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
T max(T a, T b) {
  return a < b ? b : a;
}
