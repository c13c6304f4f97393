// SPDX-License-Identifier: Apache-2.0
#include "kernels/reduce/many.h"

#include "kernels/launch.cuh"

namespace ds::kernels {
namespace {

using namespace cuda;

struct Entry {
  void* data;
  int64_t n;
  DType dtype;
  bool is_aligned;
};

// body(tag, entry, group) for the groups of four elements of this thread.
template <class Body>
__device__ __forceinline__ void each_group(const Entry& e, const ManyChunk& chunk, int64_t chunk_numel, const Body& body) {
  const int64_t end = min(e.n, (chunk.index + 1) * chunk_numel);
  for (int64_t i = chunk.index * chunk_numel + int64_t{threadIdx.x} * kPerThread; i < end; i += int64_t{kThreads} * kPerThread) {
    const Group at = group_at(i, end, e.is_aligned);
    if (e.dtype == DType::F32) body(F32{}, at);
    else if (e.dtype == DType::BF16) body(BF16{}, at);
    else body(F16{}, at);
  }
}

__global__ void __launch_bounds__(kThreads)
    squares_kernel(const Entry* entries, const ManyChunk* chunks, int64_t chunk_numel, double2* parts) {
  const ManyChunk chunk = chunks[blockIdx.x];
  const Entry e = entries[chunk.row];
  double squares = 0.0, bad = 0.0;
  each_group(e, chunk, chunk_numel, [&](auto tag, const Group& at) {
    using T = decltype(tag);
    float x[kPerThread];  // zero where there is no element
    load(tag, static_cast<const typename T::Raw*>(e.data), at, x);
#pragma unroll
    for (int k = 0; k < kPerThread; ++k) {
      squares += double{x[k]} * double{x[k]};
      bad += isfinite(x[k]) ? 0.0 : 1.0;
    }
  });
  squares = block_sum(squares);
  bad = block_sum(bad);
  if (threadIdx.x == 0) parts[blockIdx.x] = make_double2(squares, bad);
}

__global__ void __launch_bounds__(kThreads) join_kernel(const double2* parts, int64_t count, double* stats) {
  double squares = 0.0, bad = 0.0;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) {
    squares += parts[i].x;
    bad += parts[i].y;
  }
  squares = block_sum(squares);
  bad = block_sum(bad);
  if (threadIdx.x == 0) {
    stats[0] = squares;
    stats[1] = bad;
  }
}

__global__ void __launch_bounds__(kThreads)
    scale_kernel(const Entry* entries, const ManyChunk* chunks, int64_t chunk_numel, const double* factor) {
  const float by = static_cast<float>(*factor);
  if (by == 1.0f) return;
  const ManyChunk chunk = chunks[blockIdx.x];
  const Entry e = entries[chunk.row];
  each_group(e, chunk, chunk_numel, [&](auto tag, const Group& at) {
    using T = decltype(tag);
    auto* data = static_cast<typename T::Raw*>(e.data);
    float x[kPerThread];
    load(tag, data, at, x);
#pragma unroll
    for (int k = 0; k < kPerThread; ++k) x[k] = __fmul_rn(x[k], by);
    store(tag, x, data, at);
  });
}

std::vector<int64_t> numels_of(const std::vector<FloatArray>& arrays) {
  std::vector<int64_t> numels;
  for (const FloatArray& a : arrays) numels.push_back(a.n);
  return numels;
}

const ManyChunk* chunks_of(const ManyPlan& plan, const void* table) {
  return reinterpret_cast<const ManyChunk*>(static_cast<const char*>(table) + plan.chunks_offset);
}

}  // namespace

ManyPlan many_arrays_plan(const std::vector<FloatArray>& arrays) { return plan_many(numels_of(arrays), sizeof(Entry)); }

void write_arrays_table(const ManyPlan& plan, const std::vector<FloatArray>& arrays, void* table) {
  auto* entry = static_cast<Entry*>(table);
  for (const FloatArray& a : arrays) {
    DS_CHECK_VALUE(a.dtype == DType::F32 || a.dtype == DType::BF16 || a.dtype == DType::F16, "arrays: dtype must be F32, F16 or BF16, not "
                   << dtype_name(a.dtype));
    *entry++ = {a.data, a.n, a.dtype, aligned({a.data})};
  }
  write_chunks(plan, numels_of(arrays), table);
}

void squares_many(const ManyPlan& plan, const void* device_table, double* stats, void* workspace, cudaStream_t stream) {
  DS_CHECK_VALUE(stats != nullptr, "stats is null");
  auto* parts = static_cast<double2*>(workspace);
  if (plan.chunks > 0) {
    launch("squares_many", squares_kernel, plan.chunks, stream, static_cast<const Entry*>(device_table), chunks_of(plan, device_table),
           plan.chunk_numel, parts);
  }
  launch("squares_many", join_kernel, 1, stream, parts, plan.chunks, stats);
}

void scale_many(const ManyPlan& plan, const void* device_table, const double* factor, cudaStream_t stream) {
  DS_CHECK_VALUE(factor != nullptr, "factor is null");
  if (plan.chunks == 0) return;
  launch("scale_many", scale_kernel, plan.chunks, stream, static_cast<const Entry*>(device_table), chunks_of(plan, device_table),
         plan.chunk_numel, factor);
}

}  // namespace ds::kernels
