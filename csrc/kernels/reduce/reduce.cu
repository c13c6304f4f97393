// SPDX-License-Identifier: Apache-2.0
// CUDA twins of reduce.h. A thread owns groups of four consecutive elements; see launch.cuh.
#include "kernels/launch.cuh"
#include "kernels/reduce/reduce.h"

namespace ds::kernels {
namespace {

using namespace cuda;
static_assert(sizeof(Partials) == kCudaReduceWorkspaceBytes, "reduce.h states the size of the workspace");

struct Sources {
  const void* at[kCudaMaxSources];
};

template <class T, bool kStats>
__global__ void __launch_bounds__(kThreads)
    reduce_kernel(float* dst, Sources src, int nsrc, float scale, bool accumulate, int64_t n, bool is_aligned,
                  Partials* partials) {
  double squares = 0.0, bad = 0.0;
  const int64_t stride = int64_t{gridDim.x} * kThreads * kPerThread;
  for (int64_t i = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * kPerThread; i < n; i += stride) {
    const Group at = group_at(i, n, is_aligned);
    float sum[kPerThread], x[kPerThread];
    load(T{}, static_cast<const typename T::Raw*>(src.at[0]), at, sum);
    for (int k = 1; k < nsrc; ++k) {
      load(T{}, static_cast<const typename T::Raw*>(src.at[k]), at, x);
#pragma unroll
      for (int j = 0; j < kPerThread; ++j) sum[j] = __fadd_rn(sum[j], x[j]);
    }
    if (accumulate) load(F32{}, dst, at, x);
#pragma unroll
    for (int j = 0; j < kPerThread; ++j) {
      sum[j] = __fmul_rn(sum[j], scale);
      if (accumulate) sum[j] = __fadd_rn(x[j], sum[j]);
      if (kStats && j < at.count) {
        squares += double{sum[j]} * double{sum[j]};
        bad += isfinite(sum[j]) ? 0.0 : 1.0;
      }
    }
    store(F32{}, sum, dst, at);
  }
  if (kStats) leave_partials(squares, bad, partials);
}

__global__ void __launch_bounds__(kThreads) squares_kernel(const float* x, int64_t n, bool is_aligned, Partials* partials) {
  double squares = 0.0, bad = 0.0;
  const int64_t stride = int64_t{gridDim.x} * kThreads * kPerThread;
  for (int64_t i = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * kPerThread; i < n; i += stride) {
    float v[kPerThread];  // zero beyond n
    load(F32{}, x, group_at(i, n, is_aligned), v);
#pragma unroll
    for (int j = 0; j < kPerThread; ++j) {
      squares += double{v[j]} * double{v[j]};
      bad += isfinite(v[j]) ? 0.0 : 1.0;
    }
  }
  leave_partials(squares, bad, partials);
}

template <class To, class From>
__global__ void __launch_bounds__(kThreads)
    copy_kernel(typename To::Raw* dst, const typename From::Raw* src, float scale, int64_t n, bool is_aligned) {
  const int64_t i = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * kPerThread;
  if (i >= n) return;
  const Group at = group_at(i, n, is_aligned);
  float x[kPerThread];
  load(From{}, src, at, x);
#pragma unroll
  for (int j = 0; j < kPerThread; ++j) x[j] = __fmul_rn(x[j], scale);
  store(To{}, x, dst, at);
}

// `index` starts as all ones: -1, and the largest unsigned number.
template <class T>
__global__ void __launch_bounds__(kThreads)
    nonfinite_kernel(const typename T::Raw* src, int64_t n, bool is_aligned, unsigned long long* index) {
  const int64_t i = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * kPerThread;
  if (i >= n) return;
  float x[kPerThread];
  load(T{}, src, group_at(i, n, is_aligned), x);
  for (int j = 0; j < kPerThread; ++j) {
    if (!isfinite(x[j])) {
      atomicMin(index, static_cast<unsigned long long>(i + j));
      return;
    }
  }
}

void finish(const char* name, const Partials* partials, int64_t blocks, double* stats, cudaStream_t stream) {
  launch(name, join_partials, 1, stream, partials, static_cast<int>(blocks), false, stats);
}

}  // namespace

void reduce_sum(float* dst, const void* const* src, int nsrc, DType src_dt, float scale, bool accumulate, int64_t n,
                double* stats, void* workspace, cudaStream_t stream) {
  check_arrays(n, {{dst, "dst"}});
  DS_CHECK_VALUE(nsrc >= 1 && nsrc <= kCudaMaxSources,
                 "nsrc must be between 1 and " << kCudaMaxSources << ", got " << nsrc);
  DS_CHECK_VALUE(stats == nullptr || workspace != nullptr, "workspace is null");
  Sources sources{};
  bool is_aligned = aligned({dst});
  for (int k = 0; k < nsrc; ++k) {
    check_arrays(n, {{src[k], "src"}});
    sources.at[k] = src[k];
    is_aligned = is_aligned && aligned({src[k]});
  }
  auto* partials = static_cast<Partials*>(workspace);
  dispatch_float(src_dt, "src", [&](auto tag) {
    using T = decltype(tag);
    if (stats != nullptr) {
      const int64_t blocks = partial_blocks(n);
      launch("reduce_sum", reduce_kernel<T, true>, blocks, stream, dst, sources, nsrc, scale, accumulate, n, is_aligned,
             partials);
      finish("reduce_sum", partials, blocks, stats, stream);
    } else if (n > 0) {
      launch("reduce_sum", reduce_kernel<T, false>, blocks_for(n), stream, dst, sources, nsrc, scale, accumulate, n,
             is_aligned, partials);
    }
  });
}

void copy_scale(void* dst, DType dst_dt, const void* src, DType src_dt, float scale, int64_t n, cudaStream_t stream) {
  check_arrays(n, {{dst, "dst"}, {src, "src"}});
  if (n == 0) return;
  if (dst_dt == src_dt && scale == 1.0f) {
    if (dst == src) return;
    const size_t bytes = static_cast<size_t>(n) * dtype_size(src_dt);
    check(cudaMemcpyAsync(dst, src, bytes, cudaMemcpyDeviceToDevice, stream), "copy_scale");
    return;
  }
  dispatch_float(dst_dt, "dst", [&](auto to) {
    dispatch_float(src_dt, "src", [&](auto from) {
      using To = decltype(to);
      using From = decltype(from);
      launch("copy_scale", copy_kernel<To, From>, blocks_for(n), stream, static_cast<typename To::Raw*>(dst),
             static_cast<const typename From::Raw*>(src), scale, n, aligned({dst, src}));
    });
  });
}

void accumulate(float* dst, const void* src, DType src_dt, float scale, int64_t n, cudaStream_t stream) {
  reduce_sum(dst, &src, 1, src_dt, scale, true, n, nullptr, nullptr, stream);
}

void first_nonfinite(const void* src, DType src_dt, int64_t n, int64_t* index, cudaStream_t stream) {
  check_arrays(n, {{src, "src"}});
  DS_CHECK_VALUE(index != nullptr, "index is null");
  check(cudaMemsetAsync(index, 0xff, sizeof(int64_t), stream), "first_nonfinite");
  dispatch_float(src_dt, "src", [&](auto tag) {
    using T = decltype(tag);
    if (n == 0) return;
    launch("first_nonfinite", nonfinite_kernel<T>, blocks_for(n), stream, static_cast<const typename T::Raw*>(src), n,
           aligned({src}), reinterpret_cast<unsigned long long*>(index));
  });
}

void sum_squares(const float* x, int64_t n, double* stats, void* workspace, cudaStream_t stream) {
  check_arrays(n, {{x, "x"}});
  DS_CHECK_VALUE(stats != nullptr, "stats is null");
  DS_CHECK_VALUE(workspace != nullptr, "workspace is null");
  const int64_t blocks = partial_blocks(n);
  auto* partials = static_cast<Partials*>(workspace);
  launch("sum_squares", squares_kernel, blocks, stream, x, n, aligned({x}), partials);
  finish("sum_squares", partials, blocks, stats, stream);
}

}  // namespace ds::kernels
