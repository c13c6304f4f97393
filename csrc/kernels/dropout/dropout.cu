// SPDX-License-Identifier: Apache-2.0
// CUDA twins of dropout.h: bodies for the tiles of row_tiles.cuh. A whole vector's elements begin at a multiple of 4, so one call of Philox
// serves four of them.
#include "kernels/dropout/dropout.h"
#include "kernels/philox.h"
#include "kernels/row_tiles.cuh"

namespace ds::kernels {
namespace {

using namespace cuda;

struct DeviceDropout {
  const int64_t* state;
  int32_t threshold;
  float scale;
  int64_t first;  // the array's first element's place in the whole

  // x[k] = x[k] * scale, or 0 where dropped; element: the index of x[0] in the array.
  template <int kVec>
  __device__ __forceinline__ void apply(int64_t element, float (&x)[kVec]) const {
    if (threshold == 0) return;
    const uint64_t seed = static_cast<uint64_t>(state[0]), offset = static_cast<uint64_t>(state[1]);
    const uint64_t at = static_cast<uint64_t>(first + element);
    if constexpr (kVec == 1) {
      const UInt32x4 words = philox_group(seed, offset, at / 4);
      const int k = static_cast<int>(at % 4);  // chosen without indexing, which would put the words in memory
      const uint32_t word = k == 0 ? words.word[0] : k == 1 ? words.word[1] : k == 2 ? words.word[2] : words.word[3];
      x[0] = philox_below(word, threshold) ? 0.0f : x[0] * scale;
    } else {
#pragma unroll
      for (int g = 0; g < kVec; g += 4) {
        const UInt32x4 words = philox_group(seed, offset, at / 4 + g / 4);
#pragma unroll
        for (int k = 0; k < 4; ++k) x[g + k] = philox_below(words.word[k], threshold) ? 0.0f : x[g + k] * scale;
      }
    }
  }
};

DeviceDropout device_dropout(double p, const int64_t* state, int64_t first) {
  const int32_t threshold = philox_threshold(p);
  DS_CHECK_VALUE(threshold == 0 || state != nullptr, "state is null");
  return {state, threshold, p < 1.0 ? static_cast<float>(1.0 / (1.0 - p)) : 0.0f, first};
}

template <class T, int kVector>
struct DropoutAdd {
  static constexpr int kVec = kVector;
  using Raw = typename T::Raw;
  const Raw* x;
  ColumnVector bias;
  const Raw* residual;
  Raw* y;
  int64_t cols;
  DeviceDropout dropout;
  struct Column {
    float bias[kVec];
  };
  struct Input {
    Packed<kVec, T> x, residual;
  };
  __device__ Column column(int64_t c) const {
    Column column;
    bias.load(T{}, c, column.bias);
    return column;
  }
  __device__ Input load(int64_t r, int64_t c) const {
    Input in;
    in.x.load(x + r * cols + c);
    in.residual.load(residual + r * cols + c);
    return in;
  }
  __device__ void work(const Input& in, int64_t r, int64_t c, Column& column) const {
    float out[kVec];
#pragma unroll
    for (int k = 0; k < kVec; ++k) out[k] = in.x[k] + column.bias[k];
    dropout.apply(r * cols + c, out);
#pragma unroll
    for (int k = 0; k < kVec; ++k) out[k] += in.residual[k];
    store_vector(T{}, out, y + r * cols + c);
  }
};

template <class T, int kVector>
struct DropoutBackward {
  static constexpr int kVec = kVector;
  using Raw = typename T::Raw;
  const Raw* dy;
  Raw* dx;
  int64_t cols;
  DeviceDropout dropout;
  struct Column {
    float sums[kVec];
  };
  using Input = Packed<kVec, T>;
  __device__ Column column(int64_t) const {
    Column column;
#pragma unroll
    for (int k = 0; k < kVec; ++k) column.sums[k] = 0.0f;
    return column;
  }
  __device__ Input load(int64_t r, int64_t c) const {
    Input in;
    in.load(dy + r * cols + c);
    return in;
  }
  __device__ void work(const Input& in, int64_t r, int64_t c, Column& column) const {
    float out[kVec];
#pragma unroll
    for (int k = 0; k < kVec; ++k) out[k] = in[k];
    dropout.apply(r * cols + c, out);
#pragma unroll
    for (int k = 0; k < kVec; ++k) column.sums[k] += out[k];
    store_vector(T{}, out, dx + r * cols + c);
  }
};

__global__ void __launch_bounds__(kThreads)
    state_kernel(int64_t* state, uint64_t seed, uint64_t offset, const int64_t* seed_at, const int64_t* offset_at) {
  if (threadIdx.x != 0) return;
  state[0] = seed_at != nullptr ? *seed_at : static_cast<int64_t>(seed);
  state[1] = (offset_at != nullptr ? *offset_at : 0) + static_cast<int64_t>(offset);
}

}  // namespace

void dropout_add(DType dtype, const void* x, const void* bias, DType bias_dtype, const void* residual, void* y, double p,
                 const int64_t* state, int64_t rows, int64_t cols, cudaStream_t stream) {
  check_rows(rows, cols, {{x, "x"}, {residual, "residual"}, {y, "y"}});
  dispatch_float(dtype, "x", [&](auto tag) {
    using T = decltype(tag);
    using Raw = typename T::Raw;
    const ColumnVector column = column_vector(bias, bias_dtype, dtype);
    const auto *from = static_cast<const Raw*>(x), *rest = static_cast<const Raw*>(residual);
    auto* to = static_cast<Raw*>(y);
    const bool is_aligned = aligned({x, residual, y});
    if (bias == nullptr) {
      launch_flat<kVecOf<T>>("dropout_add", rows * cols, is_aligned, stream, [&](auto vec, int64_t i) {
        return DropoutAdd<T, decltype(vec)::value>{from + i, column, rest + i, to + i, int64_t{kThreads} * decltype(vec)::value,
                                                   device_dropout(p, state, i)};
      });
    } else {
      with_vector<T>(is_aligned && cols % kVecOf<T> == 0, [&](auto vec) {
        const DropoutAdd<T, decltype(vec)::value> body{from, column, rest, to, cols, device_dropout(p, state, 0)};
        launch_rows<std::decay_t<decltype(body)>, 0>("dropout_add", body, rows, cols, nullptr, dtype, nullptr, stream);
      });
    }
  });
}

void dropout_add_backward(DType dtype, const void* dy, void* dx, void* dbias, DType bias_dtype, double p, const int64_t* state, int64_t rows,
                          int64_t cols, void* workspace, cudaStream_t stream) {
  check_rows(rows, cols, {{dy, "dy"}, {dx, "dx"}});
  DS_CHECK_VALUE(dbias == nullptr || workspace != nullptr || rows * cols == 0, "workspace is null");
  dispatch_float(dtype, "dy", [&](auto tag) {
    using T = decltype(tag);
    using Raw = typename T::Raw;
    const auto* from = static_cast<const Raw*>(dy);
    auto* to = static_cast<Raw*>(dx);
    if (dbias == nullptr) {
      launch_flat<kVecOf<T>>("dropout_add_backward", rows * cols, aligned({dy, dx}), stream, [&](auto vec, int64_t i) {
        return DropoutBackward<T, decltype(vec)::value>{from + i, to + i, int64_t{kThreads} * decltype(vec)::value, device_dropout(p, state, i)};
      });
    } else {
      with_vector<T>(aligned({dy, dx}) && cols % kVecOf<T> == 0, [&](auto vec) {
        const DropoutBackward<T, decltype(vec)::value> body{from, to, cols, device_dropout(p, state, 0)};
        using Body = std::decay_t<decltype(body)>;
        launch_rows<Body, Body::kVec>("dropout_add_backward", body, rows, cols, static_cast<float*>(workspace), bias_dtype, dbias, stream);
      });
    }
  });
}

void write_philox_state(int64_t* state, uint64_t seed, uint64_t offset, const int64_t* seed_at, const int64_t* offset_at,
                        cudaStream_t stream) {
  DS_CHECK_VALUE(state != nullptr, "state is null");
  launch("philox_state", state_kernel, 1, stream, state, seed, offset, seed_at, offset_at);
}

}  // namespace ds::kernels
