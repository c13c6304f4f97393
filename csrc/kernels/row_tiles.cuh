// SPDX-License-Identifier: Apache-2.0
// Elementwise kernels over rows with something per column (a bias, a column's sum). A block of 256 threads is a tile of `across` vectors by
// 256 / across rows; it walks down its rows, four at a time so that enough bytes are on their way, and keeps what belongs to its columns in
// registers. Vectors are 16 bytes where pointers and row lengths allow it, else single elements.
//
// A body provides
//   kVec; struct Input; struct Column;
//   Column column(int64_t c)                                 what a thread keeps for columns c .. c + kVec - 1
//   Input load(int64_t r, int64_t c)
//   void work(const Input&, int64_t r, int64_t c, Column&)
// and, if kSums > 0, Column::sums[kSums]: sum j belongs to column c + j, from kVec on to column `cols` + c + j - kVec (a second half).
//
// Note [sums of columns]. Every row block writes its part of the sums; sum_parts adds the parts in order. The cuts depend on the sizes alone, so
// the bits repeat.
#pragma once

#include <type_traits>

#include "kernels/launch.cuh"

namespace ds::kernels::cuda {

constexpr int kRowsAhead = 4;
constexpr int kMostParts = 256;

template <class T>
constexpr int kVecOf = 16 / sizeof(typename T::Raw);

template <int kVec, class T>
__device__ __forceinline__ void load_vector(T tag, const typename T::Raw* p, float (&x)[kVec]) {
  Elements<T, kVec> e;
  e.load(p);
#pragma unroll
  for (int k = 0; k < kVec; ++k) x[k] = to_float(tag, e.raw[k]);
}

template <int kVec, class T>
__device__ __forceinline__ void store_vector(T, const float (&x)[kVec], typename T::Raw* p) {
  Elements<T, kVec> e;
  e.set(x);
  e.store(p);
}

// f(the vector's length as a constant): whole vectors, or single elements.
template <class T, class F>
void with_vector(bool whole, const F& f) {
  whole ? f(std::integral_constant<int, kVecOf<T>>()) : f(std::integral_constant<int, 1>());
}

// A vector as it lies in memory, not yet converted: half the registers while it is on its way.
template <int kVec, class T>
struct Packed {
  Elements<T, kVec> word;
  __device__ __forceinline__ void load(const typename T::Raw* p) { word.load(p); }
  __device__ __forceinline__ void store(typename T::Raw* p) const { word.store(p); }
  __device__ __forceinline__ float operator[](int k) const { return to_float(T{}, word.raw[k]); }
  // From here on the compiler converts anew: otherwise it keeps a float beside every element, twice the registers.
  __device__ __forceinline__ void keep_packed() {
    if constexpr (sizeof(word) == sizeof(uint4)) {
      uint4 words;
      memcpy(&words, &word, sizeof(words));
      asm volatile("" : "+r"(words.x), "+r"(words.y), "+r"(words.z), "+r"(words.w));
      memcpy(&word, &words, sizeof(words));
    }
  }
};

// A row of `cols` per-column values of dtype T or float32, null for none.
struct ColumnVector {
  const void* at;
  bool is_f32, is_aligned;
  template <int kVec, class T>
  __device__ __forceinline__ void load(T tag, int64_t c, float (&x)[kVec]) const {
    const auto* own = static_cast<const typename T::Raw*>(at);
    const auto* wide = static_cast<const float*>(at);
    if (at == nullptr) {
#pragma unroll
      for (int k = 0; k < kVec; ++k) x[k] = 0.0f;
    } else if (kVec > 1 && is_aligned && !is_f32) {
      load_vector(tag, own + c, x);
    } else if (kVec > 1 && is_aligned) {
#pragma unroll
      for (int part = 0; part + 4 <= kVec; part += 4) {
        float four[4];
        load_vector(F32{}, wide + c + part, four);
#pragma unroll
        for (int k = 0; k < 4; ++k) x[part + k] = four[k];
      }
    } else {
#pragma unroll
      for (int k = 0; k < kVec; ++k) x[k] = is_f32 ? wide[c + k] : to_float(tag, own[c + k]);
    }
  }
};

struct Tiles {
  int64_t rows, cols;
  int64_t elements;  // rows * cols, or fewer where the last row of a flat array is not full
  int across;        // threads along a row, a power of two
  int column_tiles;
  int64_t rows_per_block;
  float* parts;      // [row blocks][summed columns], for bodies with sums
  int64_t blocks() const { return column_tiles * row_blocks(); }
  int64_t row_blocks() const { return (rows + rows_per_block - 1) / rows_per_block; }
};

inline Tiles make_tiles(int64_t rows, int64_t cols, int vec, bool sums) {
  Tiles t{rows, cols, rows * cols, 1, 0, 0, nullptr};
  const int64_t vectors = cols / vec;
  while (t.across < kThreads && t.across < vectors) t.across *= 2;
  t.column_tiles = static_cast<int>((vectors + t.across - 1) / t.across);
  const int64_t step = int64_t{kRowsAhead} * (kThreads / t.across);
  t.rows_per_block = step;
  if (sums) {
    const int64_t least = (rows + kMostParts - 1) / kMostParts;
    t.rows_per_block = std::max(step, (least + step - 1) / step * step);
  }
  return t;
}

// A flat array of n elements, n a multiple of vec, as rows that one block spans.
inline Tiles flat_tiles(int64_t n, int vec) {
  const int64_t cols = int64_t{kThreads} * vec;
  Tiles t = make_tiles((n + cols - 1) / cols, cols, vec, false);
  t.elements = n;
  return t;
}

template <int kSums, int kVec, class Column>
__device__ __forceinline__ void leave_sums(const Tiles& t, const Column& column, int64_t c, bool inside, int64_t row_block) {
  __shared__ float shared[kThreads];
  const int lane = threadIdx.x % t.across, level = threadIdx.x / t.across, levels = kThreads / t.across;
  const int64_t summed = t.cols * (kSums / kVec);
#pragma unroll
  for (int j = 0; j < kSums; ++j) {
    float sum = column.sums[j];
    if (levels > 1) {  // the same for the whole block
      __syncthreads();
      shared[threadIdx.x] = sum;
      __syncthreads();
      if (level == 0) {
        for (int l = 1; l < levels; ++l) sum += shared[l * t.across + lane];
      }
    }
    if (level == 0 && inside) t.parts[row_block * summed + (j / kVec) * t.cols + c + j % kVec] = sum;
  }
}

template <class Body, int kSums>
__global__ void __launch_bounds__(kThreads) tile_kernel(const Body body, const Tiles t) {
  constexpr int kVec = Body::kVec;
  const int64_t row_block = blockIdx.x / t.column_tiles;
  const int64_t c = (int64_t{blockIdx.x % t.column_tiles} * t.across + threadIdx.x % t.across) * kVec;
  const int step = kThreads / t.across;
  const bool inside = c < t.cols;
  const int64_t end = min(t.rows, (row_block + 1) * t.rows_per_block);
  typename Body::Column column = body.column(inside ? c : 0);
  for (int64_t r = row_block * t.rows_per_block + threadIdx.x / t.across; inside && r < end; r += kRowsAhead * step) {
    typename Body::Input in[kRowsAhead];
    bool there[kRowsAhead];
#pragma unroll
    for (int k = 0; k < kRowsAhead; ++k) {
      const int64_t row = r + k * step;
      there[k] = row < end && row * t.cols + c < t.elements;
      if (there[k]) in[k] = body.load(row, c);
    }
#pragma unroll
    for (int k = 0; k < kRowsAhead; ++k) {
      if (there[k]) body.work(in[k], r + k * step, c, column);
    }
  }
  if constexpr (kSums > 0) leave_sums<kSums, kVec>(t, column, c, inside, row_block);
}

// out[c] = the sum of `count` parts in order: 32 columns by 8 groups of parts a block.
template <class T>
__global__ void __launch_bounds__(kThreads) sum_parts(const float* parts, int64_t count, int64_t cols, typename T::Raw* out) {
  __shared__ double shared[kThreads];
  const int lane = threadIdx.x % 32, group = threadIdx.x / 32;
  const int64_t c = int64_t{blockIdx.x} * 32 + lane;
  double sum = 0.0;
  for (int64_t p = group; c < cols && p < count; p += kThreads / 32) sum += parts[p * cols + c];
  shared[threadIdx.x] = sum;
  __syncthreads();
  if (group == 0 && c < cols) {
    for (int g = 1; g < kThreads / 32; ++g) sum += shared[g * 32 + lane];
    out[c] = from_float(T{}, static_cast<float>(sum));
  }
}

inline void launch_sum_parts(const char* name, const float* parts, int64_t count, int64_t cols, DType dtype, void* out, cudaStream_t stream) {
  if (cols == 0) return;
  dispatch_float(dtype, "dbias", [&](auto tag) {
    using T = decltype(tag);
    launch(name, sum_parts<T>, (cols + 31) / 32, stream, parts, count, cols, static_cast<typename T::Raw*>(out));
  });
}

inline void check_rows(int64_t rows, int64_t cols, std::initializer_list<NamedArray> arrays) {
  DS_CHECK_VALUE(rows >= 0 && cols >= 0, "rows and cols must not be negative, got " << rows << " and " << cols);
  check_arrays(std::min<int64_t>(rows, 1) * cols, arrays);
}

inline ColumnVector column_vector(const void* bias, DType bias_dtype, DType dtype) {
  DS_CHECK_VALUE(bias == nullptr || bias_dtype == dtype || bias_dtype == DType::F32,
                 "bias: dtype must be " << dtype_name(dtype) << " or float32, got " << dtype_name(bias_dtype));
  return {bias, bias_dtype == DType::F32, aligned({bias})};
}

inline int64_t parts_bytes(int64_t rows, int64_t summed_cols) {
  return std::min<int64_t>(rows, kMostParts) * summed_cols * static_cast<int64_t>(sizeof(float));
}

// Rows whose columns are summed when parts is not null, in which case out (dtype out_dtype) receives kSums / kVec * cols sums.
template <class Body, int kSums>
void launch_rows(const char* name, const Body& body, int64_t rows, int64_t cols, float* parts, DType out_dtype, void* out,
                 cudaStream_t stream) {
  Tiles t = make_tiles(rows, cols, Body::kVec, kSums > 0);
  t.parts = parts;
  if (rows > 0 && cols > 0) launch(name, tile_kernel<Body, kSums>, t.blocks(), stream, body, t);
  if (kSums > 0) launch_sum_parts(name, parts, rows > 0 ? t.row_blocks() : 0, cols * (kSums / Body::kVec), out_dtype, out, stream);
}

// A flat array: vectors, then one by one what is left. make(kVec as a constant, first element) builds the body.
template <int kVec, class Make>
void launch_flat(const char* name, int64_t n, bool is_aligned, cudaStream_t stream, const Make& make) {
  const int64_t whole = is_aligned ? n / kVec * kVec : 0;
  if (whole > 0) {
    const auto body = make(std::integral_constant<int, kVec>(), int64_t{0});
    const Tiles t = flat_tiles(whole, kVec);
    launch(name, tile_kernel<std::decay_t<decltype(body)>, 0>, t.blocks(), stream, body, t);
  }
  if (whole < n) {
    const auto body = make(std::integral_constant<int, 1>(), whole);
    const Tiles t = flat_tiles(n - whole, 1);
    launch(name, tile_kernel<std::decay_t<decltype(body)>, 0>, t.blocks(), stream, body, t);
  }
}

}  // namespace ds::kernels::cuda
