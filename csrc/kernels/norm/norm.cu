// SPDX-License-Identifier: Apache-2.0
// CUDA twin of norm.h, forward. A team of threads (a warp or a block) owns a row and keeps it in registers, packed as it lay in memory, so that
// it is read once. Rows that are too long for that, or whose vectors are not aligned, are read again by every sweep, mostly from the cache.
#include "kernels/norm/rows.cuh"

namespace ds::kernels {
namespace {

using namespace cuda;

__device__ __forceinline__ float reciprocal_root(float x) { return 1.0f / sqrtf(x); }

// (x - mean) * rstd as ((x - near) - rest) * rstd: norm.h, Note [precision].
struct Normaliser {
  float near, rest, rstd;
  __device__ __forceinline__ float operator()(float x) const { return ((x - near) - rest) * rstd; }
};

// each(f): f(value) for all of this thread's values. All threads of the team must call.
template <Norm kNorm, class Team, class Each>
__device__ __forceinline__ Normaliser statistics(const NormForward& a, const Each& each) {
  const float n = static_cast<float>(a.columns);
  float sum = 0.0f, squares = 0.0f;
  if constexpr (kNorm == Norm::Rms) {
    each([&](float x) { squares += x * x; });
    return {0.0f, 0.0f, reciprocal_root(Team::sum(squares, 0.0f).x / n + a.eps)};
  } else {
    each([&](float x) { sum += x; });
    const float near = Team::sum(sum, 0.0f).x / n;
    sum = 0.0f;
    each([&](float x) {
      sum += x - near;
      squares += (x - near) * (x - near);
    });
    const float2 sums = Team::sum(sum, squares);
    const float rest = sums.x / n;
    return {near, rest, reciprocal_root(fmaxf(sums.y / n - rest * rest, 0.0f) + a.eps)};
  }
}

template <Norm kNorm>
__device__ __forceinline__ void keep_statistics(const NormForward& a, const Normaliser& to, int64_t row) {
  if (kNorm == Norm::Layer) a.mean[row] = to.near + to.rest;
  a.rstd[row] = to.rstd;
}

template <class T, Norm kNorm, int kSize, int kVectors>
__global__ void __launch_bounds__(kThreads) forward_cached(const NormForward a, const NormParameters parameters, int64_t rows) {
  using Raw = typename T::Raw;
  using Row = CachedRow<T, kSize, kVectors>;
  constexpr int kVec = Row::kVec;
  const int64_t row = Team<kSize>::row(), n = a.columns;
  if (row >= rows) return;  // whole warps, or no thread at all: a team never splits
  Row h;
  h.load(static_cast<const Raw*>(a.x) + row * n, n);
  if (a.residual != nullptr) {
    Row residual;
    residual.load(static_cast<const Raw*>(a.residual) + row * n, n);
    Raw* out = static_cast<Raw*>(a.h) + row * n;
    h.each(n, [&](int v, int64_t i) {
      float sum[kVec];
#pragma unroll
      for (int k = 0; k < kVec; ++k) sum[k] = h.vectors[v][k] + residual.vectors[v][k];
      h.vectors[v].word.set(sum);
      h.vectors[v].store(out + i);
    });
  }
  const Normaliser to = statistics<kNorm, Team<kSize>>(a, [&](auto f) {
    h.each(n, [&](int v, int64_t) {
#pragma unroll
      for (int k = 0; k < kVec; ++k) f(h.vectors[v][k]);
    });
  });
  if (Team<kSize>::rank() == 0) keep_statistics<kNorm>(a, to, row);
  h.keep_packed();
  Raw* y = static_cast<Raw*>(a.y) + row * n;
  h.each(n, [&](int v, int64_t i) {
    float weight[kVec], bias[kVec], out[kVec];
    load_weight<kVec>(T{}, parameters, i, weight);
    load_parameter<kVec>(T{}, parameters.bias, parameters.dtype == DType::F32, 0.0f, i, bias);
#pragma unroll
    for (int k = 0; k < kVec; ++k) out[k] = to(h.vectors[v][k]) * weight[k] + bias[k];
    store_vector<kVec>(T{}, out, y + i);
  });
}

// Any row: single elements, read again by every sweep. A thread reads only what it wrote itself to h.
template <class T, Norm kNorm>
__global__ void __launch_bounds__(kThreads) forward_any(const NormForward a, const NormParameters parameters) {
  using Raw = typename T::Raw;
  const int64_t row = blockIdx.x, n = a.columns;
  const Raw* h = static_cast<const Raw*>(a.x) + row * n;
  if (a.residual != nullptr) {
    const Raw* residual = static_cast<const Raw*>(a.residual) + row * n;
    Raw* out = static_cast<Raw*>(a.h) + row * n;
    for (int64_t i = threadIdx.x; i < n; i += kThreads) out[i] = from_float(T{}, to_float(T{}, h[i]) + to_float(T{}, residual[i]));
    h = out;
  }
  const Normaliser to = statistics<kNorm, Team<kThreads>>(a, [&](auto f) {
    for (int64_t i = threadIdx.x; i < n; i += kThreads) f(to_float(T{}, h[i]));
  });
  if (threadIdx.x == 0) keep_statistics<kNorm>(a, to, row);
  Raw* y = static_cast<Raw*>(a.y) + row * n;
  for (int64_t i = threadIdx.x; i < n; i += kThreads) {
    float weight[1], bias[1];
    load_weight<1>(T{}, parameters, i, weight);
    load_parameter<1>(T{}, parameters.bias, parameters.dtype == DType::F32, 0.0f, i, bias);
    y[i] = from_float(T{}, to(to_float(T{}, h[i])) * weight[0] + bias[0]);
  }
}

}  // namespace

void norm_forward(const NormForward& a, const NormParameters& parameters, int64_t rows, cudaStream_t stream) {
  check_rows(rows, a.columns, {{a.x, "x"}, {a.y, "y"}, {a.rstd, "rstd"}});
  check_parameters(parameters, a.dtype);
  if (rows == 0 || a.columns == 0) return;
  DS_CHECK_VALUE(a.residual == nullptr || a.h != nullptr, "h is null");
  DS_CHECK_VALUE(a.norm == Norm::Rms || a.mean != nullptr, "mean is null");
  DS_CHECK_VALUE(a.norm == Norm::Layer || parameters.bias == nullptr, "bias: RMS norm has none");
  dispatch_float(a.dtype, "x", [&](auto tag) {
    with_norm(a.norm, [&](auto norm) {
      using T = decltype(tag);
      constexpr Norm kNorm = decltype(norm)::value;
      const bool whole =
          a.columns % kVecOf<T> == 0 && aligned({a.x, a.residual, a.h, a.y, parameters.weight, parameters.bias});
      const bool done = whole && with_shape<kMostVectors<T>>(a.columns / kVecOf<T>, [&](auto shape) {
        using S = decltype(shape);
        launch("norm_forward", forward_cached<T, kNorm, S::size, S::vectors>, Team<S::size>::blocks(rows), stream, a, parameters, rows);
      });
      if (!done) launch("norm_forward", forward_any<T, kNorm>, rows, stream, a, parameters);
    });
  });
}

}  // namespace ds::kernels
