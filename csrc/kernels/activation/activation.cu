// SPDX-License-Identifier: Apache-2.0
// CUDA twins of activation.h: one input, for the tiles of row_tiles.cuh.
#include "kernels/activation/device_math.cuh"
#include "kernels/row_tiles.cuh"

namespace ds::kernels {
namespace {

using namespace cuda;

template <class T, Activation kAct, int kVector>
struct Forward {
  static constexpr int kVec = kVector;
  using Raw = typename T::Raw;
  const Raw* x;
  ColumnVector bias;
  Raw* y;
  int64_t cols;
  struct Column {
    float bias[kVec];
  };
  using Input = Packed<kVec, T>;
  __device__ Column column(int64_t c) const {
    Column column;
    bias.load(T{}, c, column.bias);
    return column;
  }
  __device__ Input load(int64_t r, int64_t c) const {
    Input in;
    in.load(x + r * cols + c);
    return in;
  }
  __device__ void work(const Input& in, int64_t r, int64_t c, Column& column) const {
    float out[kVec];
#pragma unroll
    for (int k = 0; k < kVec; ++k) out[k] = activate<kAct, kFastFor<T>>(in[k] + column.bias[k]).value;
    store_vector(T{}, out, y + r * cols + c);
  }
};

template <class T, Activation kAct, int kVector>
struct Backward {
  static constexpr int kVec = kVector;
  using Raw = typename T::Raw;
  const Raw *dy, *x;
  ColumnVector bias;
  Raw* dx;
  int64_t cols;
  struct Column {
    float bias[kVec], sums[kVec];
  };
  struct Input {
    Packed<kVec, T> dy, x;
  };
  __device__ Column column(int64_t c) const {
    Column column;
    bias.load(T{}, c, column.bias);
#pragma unroll
    for (int k = 0; k < kVec; ++k) column.sums[k] = 0.0f;
    return column;
  }
  __device__ Input load(int64_t r, int64_t c) const {
    Input in;
    in.dy.load(dy + r * cols + c);
    in.x.load(x + r * cols + c);
    return in;
  }
  __device__ void work(const Input& in, int64_t r, int64_t c, Column& column) const {
    float out[kVec];
#pragma unroll
    for (int k = 0; k < kVec; ++k) {
      out[k] = in.dy[k] * activate<kAct, kFastFor<T>>(in.x[k] + column.bias[k]).slope;
      column.sums[k] += out[k];
    }
    store_vector(T{}, out, dx + r * cols + c);
  }
};

}  // namespace

int64_t cuda_bias_sums_bytes(int64_t rows, int64_t summed_cols) { return parts_bytes(rows, summed_cols); }

void bias_act(Activation act, DType dtype, const void* x, const void* bias, DType bias_dtype, void* y, int64_t rows, int64_t cols,
              cudaStream_t stream) {
  check_rows(rows, cols, {{x, "x"}, {y, "y"}});
  with_activation(act, dtype, "x", [&](auto tag, auto a) {
    using T = decltype(tag);
    using Raw = typename T::Raw;
    const ColumnVector column = column_vector(bias, bias_dtype, dtype);
    const auto *from = static_cast<const Raw*>(x);
    auto* to = static_cast<Raw*>(y);
    if (bias == nullptr) {
      launch_flat<kVecOf<T>>("bias_act", rows * cols, aligned({x, y}), stream, [&](auto vec, int64_t first) {
        return Forward<T, decltype(a)::value, decltype(vec)::value>{from + first, column, to + first, int64_t{kThreads} * decltype(vec)::value};
      });
    } else {
      with_vector<T>(aligned({x, y}) && cols % kVecOf<T> == 0, [&](auto vec) {
        const Forward<T, decltype(a)::value, decltype(vec)::value> body{from, column, to, cols};
        launch_rows<std::decay_t<decltype(body)>, 0>("bias_act", body, rows, cols, nullptr, dtype, nullptr, stream);
      });
    }
  });
}

void bias_act_backward(Activation act, DType dtype, const void* dy, const void* x, const void* bias, DType bias_dtype, void* dx, void* dbias,
                       int64_t rows, int64_t cols, void* workspace, cudaStream_t stream) {
  check_rows(rows, cols, {{dy, "dy"}, {x, "x"}, {dx, "dx"}});
  DS_CHECK_VALUE(dbias == nullptr || bias != nullptr, "dbias: a gradient is asked of a bias that is not there");
  DS_CHECK_VALUE(dbias == nullptr || workspace != nullptr || rows * cols == 0, "workspace is null");
  with_activation(act, dtype, "x", [&](auto tag, auto a) {
    using T = decltype(tag);
    using Raw = typename T::Raw;
    const ColumnVector column = column_vector(bias, bias_dtype, dtype);
    const auto *grad = static_cast<const Raw*>(dy), *from = static_cast<const Raw*>(x);
    auto* to = static_cast<Raw*>(dx);
    if (bias == nullptr) {
      launch_flat<kVecOf<T>>("bias_act_backward", rows * cols, aligned({dy, x, dx}), stream, [&](auto vec, int64_t i) {
        return Backward<T, decltype(a)::value, decltype(vec)::value>{grad + i, from + i, column, to + i,
                                                                     int64_t{kThreads} * decltype(vec)::value};
      });
    } else {
      with_vector<T>(aligned({dy, x, dx}) && cols % kVecOf<T> == 0, [&](auto vec) {
        const Backward<T, decltype(a)::value, decltype(vec)::value> body{grad, from, column, to, cols};
        using Body = std::decay_t<decltype(body)>;
        if (dbias != nullptr) {
          launch_rows<Body, Body::kVec>("bias_act_backward", body, rows, cols, static_cast<float*>(workspace), bias_dtype, dbias, stream);
        } else {
          launch_rows<Body, 0>("bias_act_backward", body, rows, cols, nullptr, bias_dtype, nullptr, stream);
        }
      });
    }
  });
}

}  // namespace ds::kernels
