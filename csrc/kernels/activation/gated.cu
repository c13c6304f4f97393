// SPDX-License-Identifier: Apache-2.0
// CUDA twins of activation.h: gate and up, for the tiles of row_tiles.cuh.
#include "kernels/activation/device_math.cuh"
#include "kernels/row_tiles.cuh"

namespace ds::kernels {
namespace {

using namespace cuda;

template <class T, Activation kAct, int kVector>
struct GatedForward {
  static constexpr int kVec = kVector;
  using Raw = typename T::Raw;
  const Raw *gate, *up;
  int64_t stride;
  ColumnVector gate_bias, up_bias;
  Raw* y;
  int64_t cols;
  struct Column {
    float gate[kVec], up[kVec];
  };
  struct Input {
    Packed<kVec, T> gate, up;
  };
  __device__ Column column(int64_t c) const {
    Column column;
    gate_bias.load(T{}, c, column.gate);
    up_bias.load(T{}, c, column.up);
    return column;
  }
  __device__ Input load(int64_t r, int64_t c) const {
    Input in;
    in.gate.load(gate + r * stride + c);
    in.up.load(up + r * stride + c);
    return in;
  }
  __device__ void work(const Input& in, int64_t r, int64_t c, Column& column) const {
    float out[kVec];
#pragma unroll
    for (int k = 0; k < kVec; ++k) {
      out[k] = activate<kAct, kFastFor<T>>(in.gate[k] + column.gate[k]).value * (in.up[k] + column.up[k]);
    }
    store_vector(T{}, out, y + r * cols + c);
  }
};

template <class T, Activation kAct, int kVector>
struct GatedBackward {
  static constexpr int kVec = kVector;
  using Raw = typename T::Raw;
  const Raw *gate, *up;
  int64_t stride;
  ColumnVector gate_bias, up_bias;
  const Raw* dy;
  Raw *dgate, *dup;
  int64_t grad_stride, cols;
  struct Column {
    float gate[kVec], up[kVec], sums[2 * kVec];
  };
  struct Input {
    Packed<kVec, T> gate, up, dy;
  };
  __device__ Column column(int64_t c) const {
    Column column;
    gate_bias.load(T{}, c, column.gate);
    up_bias.load(T{}, c, column.up);
#pragma unroll
    for (int k = 0; k < 2 * kVec; ++k) column.sums[k] = 0.0f;
    return column;
  }
  __device__ Input load(int64_t r, int64_t c) const {
    Input in;
    in.gate.load(gate + r * stride + c);
    in.up.load(up + r * stride + c);
    in.dy.load(dy + r * cols + c);
    return in;
  }
  __device__ void work(const Input& in, int64_t r, int64_t c, Column& column) const {
    float to_gate[kVec], to_up[kVec];
#pragma unroll
    for (int k = 0; k < kVec; ++k) {
      const ValueAndSlope a = activate<kAct, kFastFor<T>>(in.gate[k] + column.gate[k]);
      to_gate[k] = in.dy[k] * (in.up[k] + column.up[k]) * a.slope;
      to_up[k] = in.dy[k] * a.value;
      column.sums[k] += to_gate[k];
      column.sums[kVec + k] += to_up[k];
    }
    store_vector(T{}, to_gate, dgate + r * grad_stride + c);
    store_vector(T{}, to_up, dup + r * grad_stride + c);
  }
};

ColumnVector second_half(const ColumnVector& v, DType dtype, int64_t cols) {
  if (v.at == nullptr) return v;
  const char* at = static_cast<const char*>(v.at) + cols * static_cast<int64_t>(dtype_size(dtype));
  return {at, v.is_f32, aligned({at})};
}

}  // namespace

void gated(Activation act, DType dtype, const CudaGatedInput& in, void* y, int64_t rows, int64_t cols, cudaStream_t stream) {
  check_rows(rows, cols, {{in.gate, "gate"}, {in.up, "up"}, {y, "y"}});
  with_activation(act, dtype, "gate", [&](auto tag, auto a) {
    using T = decltype(tag);
    using Raw = typename T::Raw;
    const ColumnVector gate_bias = column_vector(in.bias, in.bias_dtype, dtype), up_bias = second_half(gate_bias, in.bias_dtype, cols);
    const auto *gate = static_cast<const Raw*>(in.gate), *up = static_cast<const Raw*>(in.up);
    auto* to = static_cast<Raw*>(y);
    const bool is_aligned = aligned({in.gate, in.up, y});
    if (rows == 1 && in.bias == nullptr) {
      launch_flat<kVecOf<T>>("gated", cols, is_aligned, stream, [&](auto vec, int64_t i) {
        constexpr int64_t kRow = int64_t{kThreads} * decltype(vec)::value;
        return GatedForward<T, decltype(a)::value, decltype(vec)::value>{gate + i, up + i, kRow, gate_bias, up_bias, to + i, kRow};
      });
    } else {
      with_vector<T>(is_aligned && cols % kVecOf<T> == 0 && in.stride % kVecOf<T> == 0, [&](auto vec) {
        const GatedForward<T, decltype(a)::value, decltype(vec)::value> body{gate, up, in.stride, gate_bias, up_bias, to, cols};
        launch_rows<std::decay_t<decltype(body)>, 0>("gated", body, rows, cols, nullptr, dtype, nullptr, stream);
      });
    }
  });
}

void gated_backward(Activation act, DType dtype, const CudaGatedInput& in, const void* dy, void* dgate, void* dup, int64_t grad_stride,
                    void* dbias, int64_t rows, int64_t cols, void* workspace, cudaStream_t stream) {
  check_rows(rows, cols, {{in.gate, "gate"}, {in.up, "up"}, {dy, "dy"}, {dgate, "dgate"}, {dup, "dup"}});
  DS_CHECK_VALUE(dbias == nullptr || in.bias != nullptr, "dbias: a gradient is asked of a bias that is not there");
  DS_CHECK_VALUE(dbias == nullptr || workspace != nullptr || rows * cols == 0, "workspace is null");
  with_activation(act, dtype, "gate", [&](auto tag, auto a) {
    using T = decltype(tag);
    using Raw = typename T::Raw;
    const ColumnVector gate_bias = column_vector(in.bias, in.bias_dtype, dtype), up_bias = second_half(gate_bias, in.bias_dtype, cols);
    const auto *gate = static_cast<const Raw*>(in.gate), *up = static_cast<const Raw*>(in.up), *grad = static_cast<const Raw*>(dy);
    auto *to_gate = static_cast<Raw*>(dgate), *to_up = static_cast<Raw*>(dup);
    const bool is_aligned = aligned({in.gate, in.up, dy, dgate, dup});
    if (rows == 1 && in.bias == nullptr) {
      launch_flat<kVecOf<T>>("gated_backward", cols, is_aligned, stream, [&](auto vec, int64_t i) {
        constexpr int64_t kRow = int64_t{kThreads} * decltype(vec)::value;
        return GatedBackward<T, decltype(a)::value, decltype(vec)::value>{gate + i, up + i, kRow, gate_bias, up_bias, grad + i,
                                                                          to_gate + i, to_up + i, kRow, kRow};
      });
    } else {
      with_vector<T>(is_aligned && cols % kVecOf<T> == 0 && in.stride % kVecOf<T> == 0 && grad_stride % kVecOf<T> == 0, [&](auto vec) {
        const GatedBackward<T, decltype(a)::value, decltype(vec)::value> body{gate, up, in.stride, gate_bias, up_bias,
                                                                              grad, to_gate, to_up, grad_stride, cols};
        using Body = std::decay_t<decltype(body)>;
        if (dbias != nullptr) {
          launch_rows<Body, 2 * Body::kVec>("gated_backward", body, rows, cols, static_cast<float*>(workspace), in.bias_dtype, dbias, stream);
        } else {
          launch_rows<Body, 0>("gated_backward", body, rows, cols, nullptr, in.bias_dtype, nullptr, stream);
        }
      });
    }
  });
}

}  // namespace ds::kernels
