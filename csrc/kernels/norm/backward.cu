// SPDX-License-Identifier: Apache-2.0
// CUDA twins of norm.h, backward. Teams and rows as in norm.cu.
//
// Note [rows and columns at once]. dx needs sums along a row, the gradients of weight and bias sums along columns. A team that walks down its
// rows has both while a row is in its registers: dy and h are read once. How many rows are a block's depends on the sizes alone, not on the GPU;
// there are so few blocks that all of them run at once (two of 256 threads, or one of 512, on a multiprocessor), and each of them asks for several
// rows, or several vectors of one, before it waits.
#include "kernels/norm/rows.cuh"

namespace ds::kernels {
namespace {

using namespace cuda;

// The two means a row's dx needs, from this thread's sums of g = dy * weight and of g times the normalised row.
template <Norm kNorm, class Team>
__device__ __forceinline__ float2 gradient_means(float grads, float along, int64_t n) {
  const float2 sums = Team::sum(grads, along);
  return make_float2(kNorm == Norm::Layer ? sums.x / static_cast<float>(n) : 0.0f, sums.y / static_cast<float>(n));
}

template <class T, Norm kNorm, int kSize, int kVectors>
__global__ void __launch_bounds__(kThreads) backward_cached(const NormBackward a, const NormParameters parameters, int64_t rows) {
  using Raw = typename T::Raw;
  using Row = CachedRow<T, kSize, kVectors>;
  constexpr int kVec = Row::kVec;
  const int64_t row = Team<kSize>::row(), n = a.columns;
  if (row >= rows) return;  // as in forward
  Row h, dy;
  dy.load(static_cast<const Raw*>(a.dy) + row * n, n);
  h.load(static_cast<const Raw*>(a.h) + row * n, n);
  const float mean = kNorm == Norm::Layer ? a.mean[row] : 0.0f, rstd = a.rstd[row];
  float grads = 0.0f, along = 0.0f;
  h.each(n, [&](int v, int64_t i) {
    float weight[kVec];
    load_weight<kVec>(T{}, parameters, i, weight);
#pragma unroll
    for (int k = 0; k < kVec; ++k) {
      const float g = dy.vectors[v][k] * weight[k];
      grads += g;
      along += g * ((h.vectors[v][k] - mean) * rstd);
    }
  });
  const float2 means = gradient_means<kNorm, Team<kSize>>(grads, along, n);
  dy.keep_packed();
  h.keep_packed();
  const Raw* dh = a.dh != nullptr ? static_cast<const Raw*>(a.dh) + row * n : nullptr;
  Raw* dx = static_cast<Raw*>(a.dx) + row * n;
  h.each(n, [&](int v, int64_t i) {
    float weight[kVec], out[kVec], more[kVec];
    load_weight<kVec>(T{}, parameters, i, weight);
    load_parameter<kVec>(T{}, dh, std::is_same_v<T, F32>, 0.0f, i, more);
#pragma unroll
    for (int k = 0; k < kVec; ++k) {
      const float x = (h.vectors[v][k] - mean) * rstd;
      out[k] = (dy.vectors[v][k] * weight[k] - means.x - x * means.y) * rstd + more[k];
    }
    store_vector<kVec>(T{}, out, dx + i);
  });
}

template <class T, Norm kNorm>
__global__ void __launch_bounds__(kThreads) backward_any(const NormBackward a, const NormParameters parameters) {
  using Raw = typename T::Raw;
  const int64_t row = blockIdx.x, n = a.columns, first = row * n;
  const float mean = kNorm == Norm::Layer ? a.mean[row] : 0.0f, rstd = a.rstd[row];
  const auto value = [&](const void* p, int64_t i) { return to_float(T{}, static_cast<const Raw*>(p)[first + i]); };
  const auto grad = [&](int64_t i) {
    float weight[1];
    load_weight<1>(T{}, parameters, i, weight);
    return value(a.dy, i) * weight[0];
  };
  float grads = 0.0f, along = 0.0f;
  for (int64_t i = threadIdx.x; i < n; i += kThreads) {
    const float g = grad(i);
    grads += g;
    along += g * ((value(a.h, i) - mean) * rstd);
  }
  const float2 means = gradient_means<kNorm, Team<kThreads>>(grads, along, n);
  for (int64_t i = threadIdx.x; i < n; i += kThreads) {
    const float x = (value(a.h, i) - mean) * rstd;
    const float more = a.dh != nullptr ? value(a.dh, i) : 0.0f;
    static_cast<Raw*>(a.dx)[first + i] = from_float(T{}, (grad(i) - means.x - x * means.y) * rstd + more);
  }
}

// Sums over rows of dy times the normalised row and, for layer norm, of dy: a body of row_tiles.cuh.
template <class T, Norm kNorm, int kVector>
struct ColumnSums {
  static constexpr int kVec = kVector;
  static constexpr int kSums = kNorm == Norm::Layer ? 2 * kVec : kVec;
  using Raw = typename T::Raw;
  const Raw *dy, *h;
  const float *mean, *rstd;
  int64_t columns;
  struct Column {
    float sums[kSums];
  };
  struct Input {
    Packed<kVec, T> dy, h;
    float mean, rstd;
  };
  __device__ Column column(int64_t) const {
    Column column;
#pragma unroll
    for (int k = 0; k < kSums; ++k) column.sums[k] = 0.0f;
    return column;
  }
  __device__ Input load(int64_t r, int64_t c) const {
    Input in;
    in.dy.load(dy + r * columns + c);
    in.h.load(h + r * columns + c);
    in.mean = kNorm == Norm::Layer ? mean[r] : 0.0f;
    in.rstd = rstd[r];
    return in;
  }
  __device__ void work(const Input& in, int64_t, int64_t, Column& column) const {
#pragma unroll
    for (int k = 0; k < kVec; ++k) {
      column.sums[k] += in.dy[k] * ((in.h[k] - in.mean) * in.rstd);
      if constexpr (kNorm == Norm::Layer) column.sums[kVec + k] += in.dy[k];
    }
  }
};


// Blocks of the kernel below, at most: those that an A100 (108 multiprocessors) runs at once. A larger GPU is kept busy by them too.
template <int kSize>
constexpr int64_t kRowBlocks = kSize > kThreads ? 108 : 216;

// One team's rows and what it keeps of them.
template <class T, Norm kNorm_, int kSize_, int kVectors_, int kRows_, bool kKept_>
struct Walk {
  static constexpr Norm kNorm = kNorm_;
  static constexpr int kSize = kSize_, kVectors = kVectors_, kVec = kVecOf<T>;
  static constexpr int kRows = kRows_;    // at once
  static constexpr bool kKept = kKept_;   // false: there are no registers for the rows; they are read again for dx
  static constexpr int kHalves = kNorm == Norm::Layer ? 2 : 1;
  static constexpr int kSums = kHalves * kVectors * kVec;
  static constexpr bool kEarlyDh = kKept && 12 * kVectors * kRows + kSums <= 96;  // there are registers for dh while the sums are made
  using Format = T;
  using Row = CachedRow<T, kSize, kVectors>;
  // The column that sum q belongs to, in the row of sums: weight's, then bias's.
  static __device__ __forceinline__ int64_t column(int q, int rank, int64_t n) {
    const int in_half = q % (kVectors * kVec);
    return (in_half / kVec * kSize + rank) * kVec + in_half % kVec + q / (kVectors * kVec) * n;
  }
};

// The block's sums to `out`. Warps that are teams of their own are added in order.
template <class W>
__device__ __forceinline__ void leave_column_sums(const float (&sums)[W::kSums], int64_t n, float* out) {
  if constexpr (W::kSize > 32) {
#pragma unroll
    for (int q = 0; q < W::kSums; q += 4) {
      const int rank = Team<W::kSize>::rank();
      if (W::Row::at(q % (W::kVectors * W::kVec) / W::kVec) >= n) continue;
      const float four[4] = {sums[q], sums[q + 1], sums[q + 2], sums[q + 3]};
      store_vector<4>(F32{}, four, out + W::column(q, rank, n));
    }
  } else {
    constexpr int kTeams = kThreads / 32, kAtOnce = W::kSums < kTeams ? W::kSums : kTeams;
    __shared__ float shared[kAtOnce][kThreads];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (int base = 0; base < W::kSums; base += kAtOnce) {
      __syncthreads();
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) shared[j][threadIdx.x] = sums[base + j];
      __syncthreads();
      const int in_row = (base + warp) % (W::kVectors * W::kVec) / W::kVec;
      if (warp >= kAtOnce || (in_row * 32 + lane) * W::kVec >= n) continue;
      float sum = shared[warp][lane];
#pragma unroll
      for (int team = 1; team < kTeams; ++team) sum += shared[warp][team * 32 + lane];
      out[W::column(base + warp, lane, n)] = sum;
    }
  }
}

template <class W>
__global__ void __launch_bounds__(Team<W::kSize>::kBlock, W::kSize > kThreads ? 1 : 2)
    walk_kernel(const NormBackward a, const NormParameters parameters, int64_t rows, int64_t rows_per_block, float* parts) {
  using T = typename W::Format;
  using Raw = typename T::Raw;
  constexpr int kVec = W::kVec, kRows = W::kRows, kTeams = Team<W::kSize>::kRows;
  constexpr bool kLayer = W::kNorm == Norm::Layer;
  const int64_t n = a.columns, begin = blockIdx.x * rows_per_block, end = min(rows, begin + rows_per_block);
  const Raw *dy = static_cast<const Raw*>(a.dy), *h = static_cast<const Raw*>(a.h), *dh = static_cast<const Raw*>(a.dh);
  float sums[W::kSums];
#pragma unroll
  for (int q = 0; q < W::kSums; ++q) sums[q] = 0.0f;
  for (int64_t first = begin + threadIdx.x / W::kSize; first < end; first += kTeams * kRows) {
    typename W::Row grad[kRows], value[kRows], more[kRows];
    int64_t row[kRows];
    float mean[kRows], rstd[kRows];
    float2 pair[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {  // rows beyond the end: the last one once more, for nothing
      row[r] = min(first + r * kTeams, end - 1);
      if (W::kKept) {
        grad[r].load(dy + row[r] * n, n);
        value[r].load(h + row[r] * n, n);
      }
      mean[r] = kLayer ? a.mean[row[r]] : 0.0f;
      rstd[r] = a.rstd[row[r]];
      pair[r] = make_float2(0.0f, 0.0f);
    }
#pragma unroll
    for (int v = 0; v < W::kVectors; ++v) {
      const int64_t i = W::Row::at(v);
      if (i >= n) continue;
      float weight[kVec];
      load_weight<kVec>(T{}, parameters, i, weight);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (!W::kKept) {
          grad[r].vectors[v].load(dy + row[r] * n + i);
          value[r].vectors[v].load(h + row[r] * n + i);
        }
        const bool there = first + r * kTeams < end;
#pragma unroll
        for (int k = 0; k < kVec; ++k) {
          const float y = grad[r].vectors[v][k], x = (value[r].vectors[v][k] - mean[r]) * rstd[r], g = y * weight[k];
          pair[r].x += g;
          pair[r].y += g * x;
          sums[v * kVec + k] += there ? y * x : 0.0f;
          if constexpr (kLayer) sums[W::kVectors * kVec + v * kVec + k] += there ? y : 0.0f;
        }
      }
    }
    if (W::kEarlyDh && dh != nullptr) {  // on its way while the sums are made
#pragma unroll
      for (int r = 0; r < kRows; ++r) more[r].load(dh + row[r] * n, n);
    }
    Team<W::kSize>::sum(pair);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      pair[r].x = kLayer ? pair[r].x / static_cast<float>(n) : 0.0f;
      pair[r].y /= static_cast<float>(n);
      if (W::kKept) {
        grad[r].keep_packed();
        value[r].keep_packed();
      }
    }
#pragma unroll
    for (int v = 0; v < W::kVectors; ++v) {
      const int64_t i = W::Row::at(v);
      if (i >= n) continue;
      float weight[kVec];
      load_weight<kVec>(T{}, parameters, i, weight);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (first + r * kTeams >= end) continue;
        const int64_t at = row[r] * n + i;
        if (!W::kKept) {
          grad[r].vectors[v].load(dy + at);
          value[r].vectors[v].load(h + at);
        }
        if (!W::kEarlyDh && dh != nullptr) more[r].vectors[v].load(dh + at);
        float out[kVec];
#pragma unroll
        for (int k = 0; k < kVec; ++k) {
          const float x = (value[r].vectors[v][k] - mean[r]) * rstd[r];
          out[k] = (grad[r].vectors[v][k] * weight[k] - pair[r].x - x * pair[r].y) * rstd[r];
          if (dh != nullptr) out[k] += more[r].vectors[v][k];
        }
        store_vector<kVec>(T{}, out, static_cast<Raw*>(a.dx) + at);
      }
    }
  }
  leave_column_sums<W>(sums, n, parts + blockIdx.x * n * W::kHalves);
}

// f(Walk) for the smallest team that holds a row of `vectors` vectors; false if none does. About four vectors of each array are on their way at once.
template <class T, Norm kNorm, class F>
bool with_walk(int64_t vectors, const F& f) {
  if (vectors <= 32) return f(Walk<T, kNorm, 32, 1, 4, true>()), true;
  if (vectors <= 64) return f(Walk<T, kNorm, 32, 2, 2, true>()), true;
  if (vectors <= 128) return f(Walk<T, kNorm, 32, 4, 1, true>()), true;
  if (vectors <= 256) return f(Walk<T, kNorm, 256, 1, 4, true>()), true;
  if (vectors <= 512) return f(Walk<T, kNorm, 256, 2, 2, true>()), true;
  if (vectors <= 1024) return f(Walk<T, kNorm, 256, 4, 1, true>()), true;
  if (vectors <= 2048) return f(Walk<T, kNorm, 512, 4, 1, true>()), true;
  if constexpr (std::is_same_v<T, F32>) {
    if (vectors <= 4096) return f(Walk<T, kNorm, 512, 8, 1, kNorm == Norm::Rms>()), true;
  }
  return false;
}

}  // namespace

void norm_backward(const NormBackward& a, const NormParameters& parameters, int64_t rows, cudaStream_t stream) {
  check_rows(rows, a.columns, {{a.dy, "dy"}, {a.h, "h"}, {a.rstd, "rstd"}, {a.dx, "dx"}});
  check_parameters(parameters, a.dtype);
  if (rows == 0 || a.columns == 0) return;
  DS_CHECK_VALUE(a.norm == Norm::Rms || a.mean != nullptr, "mean is null");
  dispatch_float(a.dtype, "dy", [&](auto tag) {
    with_norm(a.norm, [&](auto norm) {
      using T = decltype(tag);
      constexpr Norm kNorm = decltype(norm)::value;
      const bool whole = a.columns % kVecOf<T> == 0 && aligned({a.dy, a.dh, a.h, a.dx, parameters.weight});
      const bool done = whole && with_shape<kMostVectors<T>>(a.columns / kVecOf<T>, [&](auto shape) {
        using S = decltype(shape);
        launch("norm_backward", backward_cached<T, kNorm, S::size, S::vectors>, Team<S::size>::blocks(rows), stream, a, parameters, rows);
      });
      if (!done) launch("norm_backward", backward_any<T, kNorm>, rows, stream, a, parameters);
    });
  });
}

int64_t cuda_norm_sums_bytes(Norm norm, int64_t rows, int64_t columns) {
  return parts_bytes(rows, columns * (norm == Norm::Layer ? 2 : 1));
}

namespace {

void column_sums(const NormBackward& a, int64_t rows, const ParameterGradients& gradients, cudaStream_t stream) {
  dispatch_float(a.dtype, "dy", [&](auto tag) {
    with_norm(a.norm, [&](auto norm) {
      using T = decltype(tag);
      constexpr Norm kNorm = decltype(norm)::value;
      with_vector<T>(a.columns % kVecOf<T> == 0 && aligned({a.dy, a.h}), [&](auto vec) {
        using Body = ColumnSums<T, kNorm, decltype(vec)::value>;
        using Raw = typename T::Raw;
        const Body body{static_cast<const Raw*>(a.dy), static_cast<const Raw*>(a.h), a.mean, a.rstd, a.columns};
        auto* parts = static_cast<float*>(gradients.workspace);
        launch_rows<Body, Body::kSums>("norm_backward", body, rows, a.columns, parts, gradients.dtype, gradients.out, stream);
      });
    });
  });
}

}  // namespace

void norm_backward(const NormBackward& a, const NormParameters& parameters, int64_t rows, const ParameterGradients& gradients,
                   cudaStream_t stream) {
  check_rows(rows, a.columns, {{a.dy, "dy"}, {a.h, "h"}, {a.rstd, "rstd"}, {a.dx, "dx"}, {gradients.workspace, "workspace"}});
  check_arrays(a.columns, {{gradients.out, "out"}});
  check_parameters(parameters, a.dtype);
  DS_CHECK_VALUE(a.norm == Norm::Rms || a.mean != nullptr || rows * a.columns == 0, "mean is null");
  bool done = false;
  dispatch_float(a.dtype, "dy", [&](auto tag) {
    with_norm(a.norm, [&](auto norm) {
      using T = decltype(tag);
      constexpr Norm kNorm = decltype(norm)::value;
      if (rows == 0 || a.columns == 0 || a.columns % kVecOf<T> != 0) return;
      if (!aligned({a.dy, a.dh, a.h, a.dx, parameters.weight, gradients.workspace})) return;
      done = with_walk<T, kNorm>(a.columns / kVecOf<T>, [&](auto walk) {
        using W = decltype(walk);
        using WTeam = Team<W::kSize>;
        const int64_t least = (rows + kRowBlocks<W::kSize> - 1) / kRowBlocks<W::kSize>;
        const int64_t per_block = (least + WTeam::kRows - 1) / WTeam::kRows * WTeam::kRows, blocks = (rows + per_block - 1) / per_block;
        auto* parts = static_cast<float*>(gradients.workspace);
        launch_threads("norm_backward", walk_kernel<W>, blocks, WTeam::kBlock, stream, a, parameters, rows, per_block, parts);
        launch_sum_parts("norm_backward", parts, blocks, a.columns * W::kHalves, gradients.dtype, gradients.out, stream);
      });
    });
  });
  if (done) return;
  column_sums(a, rows, gradients, stream);
  norm_backward(a, parameters, rows, stream);  // last: dx may lie where dy is read
}

}  // namespace ds::kernels
