// SPDX-License-Identifier: Apache-2.0
// CUDA twins of softmax.h. A row belongs to a warp or to a block and stays in registers between its one reading and its one writing: vectors of
// 16 bytes where rows begin at multiples of that, else single elements. All of a thread's vectors are asked for before any of them is looked at.
// Rows too long for that are read twice.
#include "kernels/row_tiles.cuh"
#include "kernels/softmax/reduce_row.cuh"
#include "kernels/softmax/softmax.h"

namespace ds::kernels {
namespace {

using namespace cuda;

// The mask of one row.
struct RowMask {
  const char* data;
  DType dtype;
  int bytes;        // of an element
  bool is_aligned;  // vectors may be read as words
};

__device__ __forceinline__ RowMask row_mask(const MaskView& m, int64_t row, int vec) {
  if (m.data == nullptr) return {nullptr, m.dtype, 0, false};
  const int bytes = m.dtype == DType::F32 ? 4 : m.dtype == DType::BOOL ? 1 : 2;
  const char* data = static_cast<const char*>(m.data) + mask_offset(m, row) * bytes;
  return {data, m.dtype, bytes, reinterpret_cast<uintptr_t>(data) % min(16, vec * bytes) == 0};
}

// The bytes of kVec of its elements, not yet converted.
template <int kVec>
struct MaskWords {
  uint32_t words[kVec];

  // Of elements [i, i + count), or of kVec of them, which then are there.
  __device__ __forceinline__ void load(const RowMask& m, int64_t i, int count) {
    const char* at = m.data + i * m.bytes;
    if constexpr (kVec >= 4) {
      if (m.is_aligned) {
        if (m.bytes == 4) {
#pragma unroll
          for (int k = 0; k < kVec; k += 4) put(reinterpret_cast<const uint4*>(at)[k / 4], k);
        } else if (m.bytes * kVec == 16) {
          put(*reinterpret_cast<const uint4*>(at), 0);
        } else if (m.bytes * kVec == 8) {
          const uint2 two = *reinterpret_cast<const uint2*>(at);
          words[0] = two.x;
          words[1] = two.y;
        } else {
          words[0] = *reinterpret_cast<const uint32_t*>(at);
        }
        return;
      }
    }
#pragma unroll
    for (int k = 0; k < kVec; ++k) words[k] = 0;
#pragma unroll
    for (int k = 0; k < kVec; ++k) {
      if (k >= count) continue;
      if (m.bytes == 4) words[k] = reinterpret_cast<const uint32_t*>(at)[k];
      else if (m.bytes == 2) words[k / 2] |= uint32_t{reinterpret_cast<const uint16_t*>(at)[k]} << (16 * (k % 2));
      else words[k / 4] |= uint32_t{reinterpret_cast<const uint8_t*>(at)[k]} << (8 * (k % 4));
    }
  }
  __device__ __forceinline__ void apply(const RowMask& m, float (&z)[kVec]) const {
#pragma unroll
    for (int k = 0; k < kVec; ++k) {
      const auto half = static_cast<uint16_t>(words[k / 2] >> (16 * (k % 2)));
      if (m.dtype == DType::F32) z[k] += __uint_as_float(words[k]);
      else if (m.dtype == DType::BF16) z[k] += to_float(BF16{}, half);
      else if (m.dtype == DType::F16) z[k] += to_float(F16{}, half);
      else if ((words[k / 4] >> (8 * (k % 4)) & 0xff) != 0) z[k] = -INFINITY;  // whatever was there, a NaN too
    }
  }

 private:
  __device__ __forceinline__ void put(const uint4& four, int k) {
    words[k] = four.x;
    words[k + 1] = four.y;
    words[k + 2] = four.z;
    words[k + 3] = four.w;
  }
};

// kVec logits: -inf from element `count` on. The product is rounded before anything is subtracted from it (see rows-inl.h).
template <int kVec>
__device__ __forceinline__ void scale_logits(float scale, int64_t count, float (&z)[kVec]) {
#pragma unroll
  for (int k = 0; k < kVec; ++k) z[k] = k < count ? __fmul_rn(z[k], scale) : -INFINITY;
}

__device__ __forceinline__ float shift_of(float largest) { return largest == -INFINITY ? 0.0f : largest; }
__device__ __forceinline__ float inverse(float sum) { return sum == 0.0f ? 0.0f : 1.0f / sum; }
// e / sum in three roundings that end as one: the quotient is corrected by what is left over. The 16-bit formats round more than one makes good.
template <class T>
__device__ __forceinline__ float divide(float e, float sum, float inverse) {
  const float quotient = e * inverse;
  return sizeof(typename T::Raw) == 2 ? quotient : fmaf(fmaf(-quotient, sum, e), inverse, quotient);
}

// Vectors of the mask that are asked for together: more would not fit in registers.
template <int kVec, int kVectors>
constexpr int kMasksAtOnce = kVec * kVectors >= 64 ? 1 : kVectors >= 8 ? 2 : kVectors;

template <class T, class Team, int kVec, int kVectors, bool kMasked>
__global__ void __launch_bounds__(kThreads)
    softmax_kernel(typename T::Raw* y, const typename T::Raw* x, const SoftmaxRows s, const __grid_constant__ MaskView mask, int64_t rows) {
  const int64_t row = Team::row();
  if (row >= rows) return;  // a whole team
  const int columns = static_cast<int>(s.columns), visible = static_cast<int>(visible_columns(s, row));
  x += row * s.columns;
  y += row * s.columns;
  const auto at = [](int v) { return (v * Team::kSize + Team::rank()) * kVec; };
  Packed<kVec, T> in[kVectors];
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    if (at(v) < visible) in[v].load(x + at(v));  // a vector that is there is in the row as a whole
  }
  float z[kVectors][kVec], largest = -INFINITY, sum = 0.0f;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
#pragma unroll
    for (int k = 0; k < kVec; ++k) z[v][k] = in[v][k];
    scale_logits(s.scale, visible - at(v), z[v]);
  }
  if constexpr (kMasked) {
    const RowMask m = row_mask(mask, row, kVec);
    constexpr int kAtOnce = kMasksAtOnce<kVec, kVectors>;
#pragma unroll
    for (int base = 0; base < kVectors; base += kAtOnce) {
      MaskWords<kVec> words[kAtOnce];
#pragma unroll
      for (int v = 0; v < kAtOnce; ++v) {
        if (at(base + v) < visible) words[v].load(m, at(base + v), visible - at(base + v));
      }
#pragma unroll
      for (int v = 0; v < kAtOnce; ++v) {
        if (at(base + v) >= visible) continue;
        words[v].apply(m, z[base + v]);
        if (s.queries != 0) {  // what was added beyond the visible elements is not theirs
#pragma unroll
          for (int k = 0; k < kVec; ++k) z[base + v][k] = k < visible - at(base + v) ? z[base + v][k] : -INFINITY;
        }
      }
    }
  }
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
#pragma unroll
    for (int k = 0; k < kVec; ++k) largest = fmaxf(largest, z[v][k]);
  }
  const float shift = shift_of(Team::largest(largest));
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
#pragma unroll
    for (int k = 0; k < kVec; ++k) {
      z[v][k] = exp_for<T>(z[v][k] - shift);
      sum += z[v][k];
    }
  }
  sum = Team::sum(sum);
  const float factor = inverse(sum);
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    if (at(v) >= columns) continue;
#pragma unroll
    for (int k = 0; k < kVec; ++k) z[v][k] = k < visible - at(v) ? divide<T>(z[v][k], sum, factor) : 0.0f;  // hidden: 0 even in a row of NaNs
    store_vector(T{}, z[v], y + at(v));
  }
}

// Hidden elements are 0 even in a row of NaNs.
template <class T>
__device__ __forceinline__ void store_visible(T tag, float (&value)[kPerThread], typename T::Raw* y, int64_t i, int64_t visible, int64_t columns,
                                              bool is_aligned) {
#pragma unroll
  for (int k = 0; k < kPerThread; ++k) value[k] = i + k < visible ? value[k] : 0.0f;
  store(tag, value, y, group_at(i, columns, is_aligned));
}

template <class T>
__device__ __forceinline__ void load_logits(T tag, const typename T::Raw* x, float scale, const RowMask& mask, const Group& at,
                                            float (&z)[kPerThread]) {
  load(tag, x, at, z);
  scale_logits(scale, at.count, z);
  if (mask.data == nullptr) return;
  MaskWords<kPerThread> words;
  words.load({mask.data, mask.dtype, mask.bytes, mask.is_aligned && at.count == kPerThread}, at.i, at.count);
  words.apply(mask, z);
#pragma unroll
  for (int k = 0; k < kPerThread; ++k) z[k] = k < at.count ? z[k] : -INFINITY;
}

// Rows of any length: a running maximum with the sum that belongs to it, then once more from the start. y may be
// x: an element is written by the thread that read it last.
template <class T>
__global__ void __launch_bounds__(kThreads)
    softmax_long_kernel(typename T::Raw* y, const typename T::Raw* x, SoftmaxRows s, MaskView mask, bool is_aligned) {
  const int64_t row = blockIdx.x, visible = visible_columns(s, row);
  const RowMask m = row_mask(mask, row, kPerThread);
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
    for (int k = 0; k < kPerThread; ++k) z[k] = divide<T>(exp_for<T>(z[k] - shift), sum, factor);
    store_visible(T{}, z, y, i, visible, s.columns, is_aligned);
  }
}

template <class T, class Team, int kVec, int kVectors>
__global__ void __launch_bounds__(kThreads)
    backward_kernel(typename T::Raw* dx, const typename T::Raw* dy, const typename T::Raw* y, const SoftmaxRows s, int64_t rows) {
  const int64_t row = Team::row();
  if (row >= rows) return;  // a whole team
  const int columns = static_cast<int>(s.columns), visible = static_cast<int>(visible_columns(s, row));
  dx += row * s.columns;
  dy += row * s.columns;
  y += row * s.columns;
  const auto at = [](int v) { return (v * Team::kSize + Team::rank()) * kVec; };
  Packed<kVec, T> grad[kVectors], p[kVectors];
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    if (at(v) >= visible) continue;
    grad[v].load(dy + at(v));
    p[v].load(y + at(v));
  }
  float dot = 0.0f;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
#pragma unroll
    for (int k = 0; k < kVec; ++k) dot = k < visible - at(v) ? fmaf(grad[v][k], p[v][k], dot) : dot;
  }
  dot = Team::sum(dot);
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    grad[v].keep_packed();
    p[v].keep_packed();
  }
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    if (at(v) >= columns) continue;
    float out[kVec];
#pragma unroll
    for (int k = 0; k < kVec; ++k) out[k] = k < visible - at(v) ? s.scale * p[v][k] * (grad[v][k] - dot) : 0.0f;
    store_vector(T{}, out, dx + at(v));
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

// body(team, vectors) with the smallest team whose registers hold a row of `vectors` vectors, else false. kMost: of a thread.
template <int kVectors>
struct Vectors {
  static constexpr int value = kVectors;
};
template <int kMost, typename Body>
bool in_registers(int64_t vectors, const Body& body) {
  constexpr int64_t kWarp = WarpTeam::kSize, kBlock = BlockTeam::kSize;
  if (vectors <= kWarp) return body(WarpTeam{}, Vectors<1>{}), true;
  if (vectors <= 2 * kWarp) return body(WarpTeam{}, Vectors<2>{}), true;
  if (vectors <= 4 * kWarp) return body(WarpTeam{}, Vectors<4>{}), true;
  if (vectors <= 8 * kWarp) return body(WarpTeam{}, Vectors<8>{}), true;
  if (vectors <= 2 * kBlock) return body(BlockTeam{}, Vectors<2>{}), true;
  if (vectors <= 4 * kBlock) return body(BlockTeam{}, Vectors<4>{}), true;
  if (vectors <= 8 * kBlock) return body(BlockTeam{}, Vectors<8>{}), true;
  if constexpr (kMost > 8) {
    if (vectors <= kMost * kBlock) return body(BlockTeam{}, Vectors<kMost>{}), true;
  }
  return false;
}

// Elements a thread holds are at most 64.
template <int kVec>
constexpr int kMostVectors = kVec > 4 ? 8 : 16;

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
  dispatch_float(dtype, "x", [&](auto tag) {
    using T = decltype(tag);
    auto* out = static_cast<typename T::Raw*>(y);
    auto* in = static_cast<const typename T::Raw*>(x);
    with_vector<T>(aligned({y, x}) && s.columns % kVecOf<T> == 0, [&](auto vec) {
      constexpr int kVec = decltype(vec)::value;
      const bool done = in_registers<kMostVectors<kVec>>(s.columns / kVec, [&](auto team, auto vectors) {
        using Team = decltype(team);
        constexpr int kVectors = decltype(vectors)::value;
        const auto kernel = mask.data != nullptr ? softmax_kernel<T, Team, kVec, kVectors, true> : softmax_kernel<T, Team, kVec, kVectors, false>;
        launch("softmax", kernel, Team::blocks(rows), stream, out, in, s, mask, rows);
      });
      if (!done) launch("softmax", softmax_long_kernel<T>, rows, stream, out, in, s, mask, aligned({y, x}) && s.columns % kPerThread == 0);
    });
  });
}

void softmax_backward(void* dx, const void* dy, const void* y, DType dtype, const SoftmaxRows& s, int64_t rows, cudaStream_t stream) {
  const int64_t n = check_rows(s, rows);
  check_arrays(n, {{dx, "dx"}, {dy, "dy"}, {y, "y"}});
  if (n == 0) return;
  dispatch_float(dtype, "y", [&](auto tag) {
    using T = decltype(tag);
    auto* out = static_cast<typename T::Raw*>(dx);
    auto *grad = static_cast<const typename T::Raw*>(dy), *p = static_cast<const typename T::Raw*>(y);
    with_vector<T>(aligned({dx, dy, y}) && s.columns % kVecOf<T> == 0, [&](auto vec) {
      constexpr int kVec = decltype(vec)::value;
      const bool done = in_registers<kMostVectors<kVec>>(s.columns / kVec, [&](auto team, auto vectors) {
        using Team = decltype(team);
        launch("softmax_backward", backward_kernel<T, Team, kVec, decltype(vectors)::value>, Team::blocks(rows), stream, out, grad, p, s, rows);
      });
      if (done) return;
      launch("softmax_backward", backward_long_kernel<T>, rows, stream, out, grad, p, s, aligned({dx, dy, y}) && s.columns % kPerThread == 0);
    });
  });
}

}  // namespace ds::kernels
