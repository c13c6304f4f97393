// SPDX-License-Identifier: Apache-2.0
// CUDA twins of norm.h. A team of threads (a warp or a block) owns a row and keeps it in registers, packed as it lay in memory, so that it
// is read once. Rows that are too long for that, or whose vectors are not aligned, are read again by every sweep, mostly from the cache.
#include "kernels/norm/norm.h"
#include "kernels/row_tiles.cuh"

namespace ds::kernels {
namespace {

using namespace cuda;

// kSize threads, a warp or a block, that own a row.
template <int kSize>
struct Team {
  static_assert(kSize == 32 || kSize == kThreads);
  static constexpr int kRows = kThreads / kSize;  // of a block
  static int64_t blocks(int64_t rows) { return (rows + kRows - 1) / kRows; }
  static __device__ __forceinline__ int rank() { return threadIdx.x % kSize; }
  static __device__ __forceinline__ int64_t row() { return int64_t{blockIdx.x} * kRows + threadIdx.x / kSize; }
  // The team's sums of a and b in every thread, added in a fixed order. All threads of a warp must call, of a block if that is the team.
  static __device__ __forceinline__ float2 sum(float a, float b) {
#pragma unroll
    for (int apart = 16; apart > 0; apart /= 2) {
      a += __shfl_xor_sync(0xffffffffu, a, apart);
      b += __shfl_xor_sync(0xffffffffu, b, apart);
    }
    if constexpr (kSize > 32) {
      __shared__ float2 warps[kSize / 32];
      __syncthreads();  // the array may still be read by the previous call
      if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = make_float2(a, b);
      __syncthreads();
      a = b = 0.0f;
#pragma unroll
      for (int w = 0; w < kSize / 32; ++w) {
        a += warps[w].x;
        b += warps[w].y;
      }
    }
    return make_float2(a, b);
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
  // From here on the compiler unpacks anew: otherwise it keeps a float beside every element, twice the registers.
  __device__ __forceinline__ void keep_packed() {
    static_assert(sizeof(vectors[0].word) == sizeof(uint4));
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      uint4 words = *reinterpret_cast<const uint4*>(&vectors[v].word);
      asm volatile("" : "+r"(words.x), "+r"(words.y), "+r"(words.z), "+r"(words.w));
      *reinterpret_cast<uint4*>(&vectors[v].word) = words;
    }
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
#pragma unroll
      for (int k = 0; k < kVec; ++k) h.vectors[v].word.raw[k] = from_float(T{}, h.vectors[v][k] + residual.vectors[v][k]);
      *reinterpret_cast<decltype(h.vectors[v].word)*>(out + i) = h.vectors[v].word;
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
struct ParameterGradients {
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

void check_parameters(const NormParameters& p, DType dtype) {
  DS_CHECK_VALUE(p.dtype == dtype || p.dtype == DType::F32, "weight: dtype must be that of x or F32, not " << dtype_name(p.dtype));
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

void norm_parameter_gradients(const NormBackward& a, int64_t rows, void* out, DType out_dtype, void* workspace, cudaStream_t stream) {
  check_rows(rows, a.columns, {{a.dy, "dy"}, {a.h, "h"}, {a.rstd, "rstd"}, {workspace, "workspace"}});
  check_arrays(a.columns, {{out, "out"}});
  DS_CHECK_VALUE(a.norm == Norm::Rms || a.mean != nullptr || rows * a.columns == 0, "mean is null");
  dispatch_float(a.dtype, "dy", [&](auto tag) {
    with_norm(a.norm, [&](auto norm) {
      using T = decltype(tag);
      constexpr Norm kNorm = decltype(norm)::value;
      with_vector<T>(a.columns % kVecOf<T> == 0 && aligned({a.dy, a.h}), [&](auto vec) {
        using Body = ParameterGradients<T, kNorm, decltype(vec)::value>;
        using Raw = typename T::Raw;
        const Body body{static_cast<const Raw*>(a.dy), static_cast<const Raw*>(a.h), a.mean, a.rstd, a.columns};
        auto* parts = static_cast<float*>(workspace);
        launch_rows<Body, Body::kSums>("norm_parameter_gradients", body, rows, a.columns, parts, out_dtype, out, stream);
      });
    });
  });
}

}  // namespace ds::kernels
