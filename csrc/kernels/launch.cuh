// SPDX-License-Identifier: Apache-2.0
// The one launch helper: every kernel starts through `launch` (or `launch_threads`), which checks that it did. And four elements at a time:
// loads and stores of a thread's consecutive elements in the storage formats of dispatch.h.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <tuple>
#include <type_traits>
#include <utility>

#include "kernels/dispatch.h"

namespace ds::kernels::cuda {

constexpr int kThreads = 256;
constexpr int kPerThread = 4;

inline void check(cudaError_t status, const char* what) {
  DS_CHECK(status == cudaSuccess, what << ": " << cudaGetErrorName(status) << ", " << cudaGetErrorString(status));
}

template <typename... Parameters, typename... Arguments>
void launch_threads(const char* name, void (*kernel)(Parameters...), int64_t blocks, int threads, cudaStream_t stream,
                    Arguments&&... arguments) {
  DS_CHECK(blocks > 0 && blocks <= std::numeric_limits<int>::max(), name << ": cannot launch " << blocks << " blocks");
  std::tuple<std::remove_const_t<Parameters>...> values(std::forward<Arguments>(arguments)...);
  std::apply(
      [&](auto&... value) {
        void* pointers[] = {&value...};
        const cudaError_t status = cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(blocks)), dim3(static_cast<unsigned>(threads)), pointers, 0, stream);
        if (status != cudaSuccess) cudaGetLastError();  // it is said here: whoever asks next, torch after its own launch, is not to hear it again
        check(status, name);
      },
      values);
}

// Blocks of kThreads.
template <typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), int64_t blocks, cudaStream_t stream, Arguments&&... arguments) {
  launch_threads(name, kernel, blocks, kThreads, stream, std::forward<Arguments>(arguments)...);
}

// Blocks so that each thread has one group of kPerThread elements.
inline int64_t blocks_for(int64_t n) {
  constexpr int64_t kBlock = int64_t{kThreads} * kPerThread;
  return n / kBlock + (n % kBlock != 0);
}

// Whether groups of four elements may be moved as one word: 16-byte alignment does for every format.
inline bool aligned(std::initializer_list<const void*> pointers) {
  return std::all_of(pointers.begin(), pointers.end(),
                     [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; });
}

__device__ __forceinline__ float to_float(F32, float x) { return x; }
__device__ __forceinline__ float to_float(BF16, uint16_t x) { return __uint_as_float(static_cast<uint32_t>(x) << 16); }
__device__ __forceinline__ float to_float(F16, uint16_t x) { return __half2float(__ushort_as_half(x)); }
__device__ __forceinline__ float from_float(F32, float x) { return x; }
__device__ __forceinline__ uint16_t from_float(BF16, float x) { return __bfloat16_as_ushort(__float2bfloat16_rn(x)); }
__device__ __forceinline__ uint16_t from_float(F16, float x) { return __half_as_ushort(__float2half_rn(x)); }

// Elements [i, i + count) of an array, count <= kPerThread; `whole`: count is kPerThread and the address is aligned.
struct Group {
  int64_t i;
  int count;
  bool whole;
};

__device__ __forceinline__ Group group_at(int64_t i, int64_t n, bool is_aligned) {
  const int64_t left = n - i;
  const int count = left < kPerThread ? static_cast<int>(left) : kPerThread;
  return {i, count, is_aligned && count == kPerThread};
}

// Two elements as they lie in memory, the first in the lower half: one instruction instead of three.
__device__ __forceinline__ uint32_t from_floats(BF16, float a, float b) {
  const __nv_bfloat162 two = __floats2bfloat162_rn(a, b);
  return *reinterpret_cast<const uint32_t*>(&two);
}
__device__ __forceinline__ uint32_t from_floats(F16, float a, float b) {
  const __half2 two = __floats2half2_rn(a, b);
  return *reinterpret_cast<const uint32_t*>(&two);
}

// Note [words]. An assignment of 16 bytes is four stores to the compiler, which it does not always put together again: the activations were written
// 4 bytes at a time, each a request of its own to the second-level cache. So bytes that are to move as one word are stored by one instruction.
__device__ __forceinline__ void store_word(uint4* p, const uint4& x) {
#ifdef __NVCC__
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w) : "memory");
#else
  *p = x;
#endif
}
__device__ __forceinline__ void store_word(uint2* p, const uint2& x) {
#ifdef __NVCC__
  asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(p), "r"(x.x), "r"(x.y) : "memory");
#else
  *p = x;
#endif
}
__device__ __forceinline__ void store_word(uint32_t* p, uint32_t x) { *p = x; }
__device__ __forceinline__ void store_word(uint16_t* p, uint16_t x) { *p = x; }

template <size_t kBytes>
struct WordOf;
template <>
struct WordOf<2> {
  using Type = uint16_t;
};
template <>
struct WordOf<4> {
  using Type = uint32_t;
};
template <>
struct WordOf<8> {
  using Type = uint2;
};
template <>
struct WordOf<16> {
  using Type = uint4;
};

// kCount elements, aligned.
template <class T, int kCount>
struct alignas(sizeof(typename T::Raw) * kCount) Elements {
  typename T::Raw raw[kCount];
  using Word = typename WordOf<sizeof(typename T::Raw) * kCount>::Type;

  __device__ __forceinline__ void load(const typename T::Raw* p) {
    const Word word = *reinterpret_cast<const Word*>(p);
    memcpy(raw, &word, sizeof(word));
  }
  __device__ __forceinline__ void store(typename T::Raw* p) const {
    Word word;
    memcpy(&word, raw, sizeof(word));
    store_word(reinterpret_cast<Word*>(p), word);
  }
  __device__ __forceinline__ void set(const float (&x)[kCount]) {
    if constexpr (sizeof(typename T::Raw) == 2 && kCount % 2 == 0) {
#pragma unroll
      for (int k = 0; k < kCount; k += 2) {
        const uint32_t two = from_floats(T{}, x[k], x[k + 1]);
        memcpy(raw + k, &two, sizeof(two));
      }
    } else {
#pragma unroll
      for (int k = 0; k < kCount; ++k) raw[k] = from_float(T{}, x[k]);
    }
  }
};

// A group's elements, not yet converted: whoever needs several arrays fetches all of them before converting any. Beyond `count`: zeros.
template <class T>
__device__ __forceinline__ Elements<T, kPerThread> fetch(T, const typename T::Raw* p, const Group& at) {
  Elements<T, kPerThread> e{};
  if (at.whole) {
    e.load(p + at.i);
  } else {
#pragma unroll
    for (int k = 0; k < kPerThread; ++k) {
      if (k < at.count) e.raw[k] = p[at.i + k];
    }
  }
  return e;
}

template <class T>
__device__ __forceinline__ void convert(T tag, const Elements<T, kPerThread>& e, float (&x)[kPerThread]) {
#pragma unroll
  for (int k = 0; k < kPerThread; ++k) x[k] = to_float(tag, e.raw[k]);
}

template <class T>
__device__ __forceinline__ void load(T tag, const typename T::Raw* p, const Group& at, float (&x)[kPerThread]) {
  convert(tag, fetch(tag, p, at), x);
}

template <class T>
__device__ __forceinline__ void store(T tag, const float (&x)[kPerThread], typename T::Raw* p, const Group& at) {
  if (at.whole) {
    Elements<T, kPerThread> e;
    e.set(x);
    e.store(p + at.i);
  } else {
#pragma unroll
    for (int k = 0; k < kPerThread; ++k) {
      if (k < at.count) p[at.i + k] = from_float(tag, x[k]);
    }
  }
}
__device__ __forceinline__ void store(None, const float (&)[kPerThread], uint8_t*, const Group&) {}

// Sum over the block in a fixed order; the result is in thread 0. Call from every thread.
__device__ __forceinline__ double block_sum(double x) {
  __shared__ double warps[kThreads / 32];
  for (int apart = 16; apart > 0; apart /= 2) x += __shfl_down_sync(0xffffffffu, x, apart);
  __syncthreads();  // the array may still be read by the previous call
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = x;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int w = 1; w < kThreads / 32; ++w) x += warps[w];
  }
  return x;
}

// Two sums of a whole array: every block leaves its part in the workspace, one block joins them in order. The grid
// depends on n alone, so the bits repeat on any GPU.
constexpr int kMaxPartials = 1024;
struct Partials {
  double first[kMaxPartials];
  double second[kMaxPartials];
};

inline int64_t partial_blocks(int64_t n) { return std::min<int64_t>(kMaxPartials, std::max<int64_t>(1, blocks_for(n))); }

__device__ __forceinline__ void leave_partials(double first, double second, Partials* partials) {
  first = block_sum(first);
  second = block_sum(second);
  if (threadIdx.x == 0) {
    partials->first[blockIdx.x] = first;
    partials->second[blockIdx.x] = second;
  }
}

// out[0..1] = (or +=, if `add`) the sums of `count` partials.
static __global__ void join_partials(const Partials* partials, int count, bool add, double* out) {
  double first = 0.0, second = 0.0;
  for (int i = threadIdx.x; i < count; i += kThreads) {
    first += partials->first[i];
    second += partials->second[i];
  }
  first = block_sum(first);
  second = block_sum(second);
  if (threadIdx.x == 0) {
    out[0] = add ? out[0] + first : first;
    out[1] = add ? out[1] + second : second;
  }
}

}  // namespace ds::kernels::cuda
