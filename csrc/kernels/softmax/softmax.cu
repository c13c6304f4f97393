// SPDX-License-Identifier: Apache-2.0
// CUDA twins of softmax.h. A row belongs to a warp (up to 1024 columns) or to a block and stays in registers between its one reading
// and its one writing; rows too long for that are read twice.
#include "kernels/softmax/reduce_row.cuh"
#include "kernels/softmax/softmax.h"

namespace ds::kernels {
namespace {

using namespace cuda;

// The mask of one row.
struct RowMask {
  const void* data;
  DType dtype;
  bool is_aligned;  // groups of four may be read as one word
};

__device__ __forceinline__ RowMask row_mask(const MaskView& m, int64_t row) {
  if (m.data == nullptr) return {nullptr, m.dtype, false};
  const int64_t offset = mask_offset(m, row);
  const int bytes = m.dtype == DType::F32 ? 4 : m.dtype == DType::BOOL ? 1 : 2;
  const char* data = static_cast<const char*>(m.data) + offset * bytes;
  return {data, m.dtype, reinterpret_cast<uintptr_t>(data) % (bytes * kPerThread) == 0};
}

__device__ __forceinline__ void apply_mask(const RowMask& m, const Group& at, float (&z)[kPerThread]) {
  if (m.data == nullptr) return;
  const Group from = {at.i, at.count, m.is_aligned && at.count == kPerThread};
  float added[kPerThread];
  if (m.dtype == DType::BOOL) {
    const auto* hidden = static_cast<const uint8_t*>(m.data);
#pragma unroll
    for (int k = 0; k < kPerThread; ++k) added[k] = k < at.count && hidden[at.i + k] != 0 ? -INFINITY : 0.0f;
#pragma unroll
    for (int k = 0; k < kPerThread; ++k) z[k] = added[k] != 0.0f ? -INFINITY : z[k];  // whatever was there, a NaN too
    return;
  }
  if (m.dtype == DType::F32) load(F32{}, static_cast<const float*>(m.data), from, added);
  else if (m.dtype == DType::BF16) load(BF16{}, static_cast<const uint16_t*>(m.data), from, added);
  else load(F16{}, static_cast<const uint16_t*>(m.data), from, added);
#pragma unroll
  for (int k = 0; k < kPerThread; ++k) z[k] += added[k];
}

// Four logits; -inf from `at.count` on. The product is rounded before anything is subtracted from it (see rows-inl.h).
template <class T>
__device__ __forceinline__ void load_logits(T tag, const typename T::Raw* x, float scale, const RowMask& mask, const Group& at,
                                            float (&z)[kPerThread]) {
  load(tag, x, at, z);
#pragma unroll
  for (int k = 0; k < kPerThread; ++k) z[k] = __fmul_rn(z[k], scale);
  apply_mask(mask, at, z);
#pragma unroll
  for (int k = 0; k < kPerThread; ++k) z[k] = k < at.count ? z[k] : -INFINITY;
}

__device__ __forceinline__ float shift_of(float largest) { return largest == -INFINITY ? 0.0f : largest; }
__device__ __forceinline__ float inverse(float sum) { return sum == 0.0f ? 0.0f : 1.0f / sum; }
// e / sum in three roundings that end as one: the quotient is corrected by what is left over.
__device__ __forceinline__ float divide(float e, float sum, float inverse) {
  const float quotient = e * inverse;
  return fmaf(fmaf(-quotient, sum, e), inverse, quotient);
}

// Hidden elements are 0 even in a row of NaNs.
template <class T>
__device__ __forceinline__ void store_visible(T tag, float (&value)[kPerThread], typename T::Raw* y, int64_t i, int64_t visible, int64_t columns,
                                              bool is_aligned) {
#pragma unroll
  for (int k = 0; k < kPerThread; ++k) value[k] = i + k < visible ? value[k] : 0.0f;
  store(tag, value, y, group_at(i, columns, is_aligned));
}

template <class T, class Team, int kGroups>
__global__ void __launch_bounds__(kThreads)
    softmax_kernel(typename T::Raw* y, const typename T::Raw* x, SoftmaxRows s, MaskView mask, int64_t rows, bool is_aligned) {
  const int64_t row = Team::row();
  if (row >= rows) return;  // a whole team
  const int columns = static_cast<int>(s.columns), visible = static_cast<int>(visible_columns(s, row));
  const RowMask m = row_mask(mask, row);
  x += row * s.columns;
  y += row * s.columns;
  float z[kGroups][kPerThread], largest = -INFINITY, sum = 0.0f;
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
    const int i = (g * Team::kSize + Team::rank()) * kPerThread;
    if (i < visible) {
      load_logits(T{}, x, s.scale, m, group_at(i, visible, is_aligned), z[g]);
    } else {
#pragma unroll
      for (int k = 0; k < kPerThread; ++k) z[g][k] = -INFINITY;
    }
#pragma unroll
    for (int k = 0; k < kPerThread; ++k) largest = fmaxf(largest, z[g][k]);
  }
  const float shift = shift_of(Team::largest(largest));
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
#pragma unroll
    for (int k = 0; k < kPerThread; ++k) {
      z[g][k] = expf(z[g][k] - shift);
      sum += z[g][k];
    }
  }
  sum = Team::sum(sum);
  const float factor = inverse(sum);
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
    const int i = (g * Team::kSize + Team::rank()) * kPerThread;
    if (i >= columns) continue;
#pragma unroll
    for (int k = 0; k < kPerThread; ++k) z[g][k] = divide(z[g][k], sum, factor);
    store_visible(T{}, z[g], y, i, visible, columns, is_aligned);
  }
}

// Rows of any length: a running maximum with the sum that belongs to it, then once more from the start. y may be
// x: an element is written by the thread that read it last.
template <class T>
__global__ void __launch_bounds__(kThreads)
    softmax_long_kernel(typename T::Raw* y, const typename T::Raw* x, SoftmaxRows s, MaskView mask, bool is_aligned) {
  const int64_t row = blockIdx.x, visible = visible_columns(s, row);
  const RowMask m = row_mask(mask, row);
  x += row * s.columns;
  y += row * s.columns;
  OnlineSum online;
  float z[kPerThread] = {};
  for (int64_t i = int64_t{threadIdx.x} * kPerThread; i < visible; i += kThreads * kPerThread) {
    load_logits(T{}, x, s.scale, m, group_at(i, visible, is_aligned), z);
    online.add(z);
  }
  const float largest = BlockTeam::largest(online.largest);
  const float sum = BlockTeam::sum(online.sum_at(largest)), factor = inverse(sum), shift = shift_of(largest);
  for (int64_t i = int64_t{threadIdx.x} * kPerThread; i < s.columns; i += kThreads * kPerThread) {
    if (i < visible) load_logits(T{}, x, s.scale, m, group_at(i, visible, is_aligned), z);
#pragma unroll
    for (int k = 0; k < kPerThread; ++k) z[k] = divide(expf(z[k] - shift), sum, factor);
    store_visible(T{}, z, y, i, visible, s.columns, is_aligned);
  }
}

template <class T, class Team, int kGroups>
__global__ void __launch_bounds__(kThreads)
    backward_kernel(typename T::Raw* dx, const typename T::Raw* dy, const typename T::Raw* y, SoftmaxRows s, int64_t rows, bool is_aligned) {
  const int64_t row = Team::row();
  if (row >= rows) return;  // a whole team
  const int columns = static_cast<int>(s.columns), visible = static_cast<int>(visible_columns(s, row));
  dx += row * s.columns;
  dy += row * s.columns;
  y += row * s.columns;
  float grad[kGroups][kPerThread], p[kGroups][kPerThread], dot = 0.0f;
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
    const int i = (g * Team::kSize + Team::rank()) * kPerThread;
    if (i < visible) {
      load(T{}, dy, group_at(i, visible, is_aligned), grad[g]);
      load(T{}, y, group_at(i, visible, is_aligned), p[g]);
    } else {
#pragma unroll
      for (int k = 0; k < kPerThread; ++k) grad[g][k] = p[g][k] = 0.0f;
    }
#pragma unroll
    for (int k = 0; k < kPerThread; ++k) dot = fmaf(grad[g][k], p[g][k], dot);
  }
  dot = Team::sum(dot);
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
    const int i = (g * Team::kSize + Team::rank()) * kPerThread;
    if (i >= columns) continue;
#pragma unroll
    for (int k = 0; k < kPerThread; ++k) grad[g][k] = s.scale * p[g][k] * (grad[g][k] - dot);
    store_visible(T{}, grad[g], dx, i, visible, columns, is_aligned);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    backward_long_kernel(typename T::Raw* dx, const typename T::Raw* dy, const typename T::Raw* y, SoftmaxRows s, bool is_aligned) {
  const int64_t row = blockIdx.x, visible = visible_columns(s, row);
  dx += row * s.columns;
  dy += row * s.columns;
  y += row * s.columns;
  float grad[kPerThread] = {}, p[kPerThread] = {}, dot = 0.0f;
  for (int64_t i = int64_t{threadIdx.x} * kPerThread; i < visible; i += kThreads * kPerThread) {
    load(T{}, dy, group_at(i, visible, is_aligned), grad);
    load(T{}, y, group_at(i, visible, is_aligned), p);
#pragma unroll
    for (int k = 0; k < kPerThread; ++k) dot = fmaf(grad[k], p[k], dot);
  }
  dot = BlockTeam::sum(dot);
  for (int64_t i = int64_t{threadIdx.x} * kPerThread; i < s.columns; i += kThreads * kPerThread) {
    if (i < visible) {
      load(T{}, dy, group_at(i, visible, is_aligned), grad);
      load(T{}, y, group_at(i, visible, is_aligned), p);
    }
#pragma unroll
    for (int k = 0; k < kPerThread; ++k) grad[k] = s.scale * p[k] * (grad[k] - dot);
    store_visible(T{}, grad, dx, i, visible, s.columns, is_aligned);
  }
}

// body(team, groups) with the smallest team whose registers hold a row of `columns`, else false. kMaxGroups: of a block.
template <int kGroups>
struct Groups {
  static constexpr int value = kGroups;
};
template <int kMaxGroups, typename Body>
bool in_registers(int64_t columns, const Body& body) {
  constexpr int64_t kWarp = WarpTeam::kSize * kPerThread, kBlock = BlockTeam::kSize * kPerThread;
  if (columns <= kWarp) body(WarpTeam{}, Groups<1>{});
  else if (columns <= 2 * kWarp) body(WarpTeam{}, Groups<2>{});
  else if (columns <= 4 * kWarp) body(WarpTeam{}, Groups<4>{});
  else if (columns <= 8 * kWarp) body(WarpTeam{}, Groups<8>{});
  else if (columns <= 2 * kBlock) body(BlockTeam{}, Groups<2>{});
  else if (columns <= 4 * kBlock) body(BlockTeam{}, Groups<4>{});
  else if (columns <= 8 * kBlock) body(BlockTeam{}, Groups<8>{});
  else if (columns <= kMaxGroups * kBlock) body(BlockTeam{}, Groups<kMaxGroups>{});
  else return false;
  return true;
}

// How many elements there are; refuses rows that are none.
int64_t check_rows(const SoftmaxRows& s, int64_t rows) {
  DS_CHECK_VALUE(s.columns >= 0, "columns must not be negative, got " << s.columns);
  DS_CHECK_VALUE(s.queries >= 0, "queries must not be negative, got " << s.queries);
  DS_CHECK_VALUE(rows >= 0, "rows must not be negative, got " << rows);
  return rows * s.columns;
}

}  // namespace

void softmax(void* y, const void* x, DType dtype, const SoftmaxRows& s, const MaskView& mask, int64_t rows, cudaStream_t stream) {
  const int64_t n = check_rows(s, rows);
  check_arrays(n, {{y, "y"}, {x, "x"}});
  if (n == 0) return;
  if (mask.data != nullptr && mask.dtype != DType::BOOL) dispatch_float(mask.dtype, "mask", [](auto) {});
  const bool vectors = aligned({y, x}) && s.columns % kPerThread == 0;
  dispatch_float(dtype, "x", [&](auto tag) {
    using T = decltype(tag);
    auto* out = static_cast<typename T::Raw*>(y);
    auto* in = static_cast<const typename T::Raw*>(x);
    const bool done = in_registers<16>(s.columns, [&](auto team, auto groups) {
      using Team = decltype(team);
      launch("softmax", softmax_kernel<T, Team, decltype(groups)::value>, Team::blocks(rows), stream, out, in, s, mask, rows, vectors);
    });
    if (!done) launch("softmax", softmax_long_kernel<T>, rows, stream, out, in, s, mask, vectors);
  });
}

void softmax_backward(void* dx, const void* dy, const void* y, DType dtype, const SoftmaxRows& s, int64_t rows, cudaStream_t stream) {
  const int64_t n = check_rows(s, rows);
  check_arrays(n, {{dx, "dx"}, {dy, "dy"}, {y, "y"}});
  if (n == 0) return;
  const bool vectors = aligned({dx, dy, y}) && s.columns % kPerThread == 0;
  dispatch_float(dtype, "y", [&](auto tag) {
    using T = decltype(tag);
    auto* out = static_cast<typename T::Raw*>(dx);
    auto *grad = static_cast<const typename T::Raw*>(dy), *p = static_cast<const typename T::Raw*>(y);
    const bool done = in_registers<8>(s.columns, [&](auto team, auto groups) {
      using Team = decltype(team);
      launch("softmax_backward", backward_kernel<T, Team, decltype(groups)::value>, Team::blocks(rows), stream, out, grad, p, s, rows, vectors);
    });
    if (!done) launch("softmax_backward", backward_long_kernel<T>, rows, stream, out, grad, p, s, vectors);
  });
}

}  // namespace ds::kernels
