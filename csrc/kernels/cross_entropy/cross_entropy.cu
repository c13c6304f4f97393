// SPDX-License-Identifier: Apache-2.0
// CUDA twins of cross_entropy.h: a block owns a row. The forward pass reads it once, with a running maximum a thread; the gradient reads
// it once more and writes it. A thread asks for kAhead vectors (16 bytes each where rows begin at multiples of that) before it looks at any.
#include "kernels/cross_entropy/cross_entropy.h"
#include "kernels/cross_entropy/element.h"
#include "kernels/row_tiles.cuh"
#include "kernels/softmax/reduce_row.cuh"

namespace ds::kernels {
namespace {

using namespace cuda;

constexpr int kAhead = 4;

// body(vector, i) for this thread's vectors of the row, i being the column one begins at.
template <class T, int kVec, class Body>
__device__ __forceinline__ void each_vector(const typename T::Raw* x, int64_t columns, const Body& body) {
  constexpr int64_t kStep = int64_t{kThreads} * kVec;
  for (int64_t i = int64_t{threadIdx.x} * kVec; i < columns; i += kAhead * kStep) {
    Packed<kVec, T> in[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      if (i + k * kStep < columns) in[k].load(x + i + k * kStep);
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      if (i + k * kStep < columns) body(in[k], i + k * kStep);
    }
  }
}

template <class T, int kVec>
__global__ void __launch_bounds__(kThreads)
    loss_kernel(float* loss, float* stats, const typename T::Raw* x, const int64_t* labels, CrossEntropy c, LabelReport report) {
  const int64_t row = blockIdx.x, label = labels[row];
  if (is_out_of_range(c, label)) {  // the whole block
    if (threadIdx.x == 0) {
      loss[row] = stats[2 * row] = stats[2 * row + 1] = NAN;
      if (report.word != nullptr) *static_cast<volatile uint64_t*>(report.word) = bad_label_word(report.first_row + row, label);
    }
    return;
  }
  if (label == c.ignored) {  // the whole block
    if (threadIdx.x == 0) {
      loss[row] = stats[2 * row] = 0.0f;
      stats[2 * row + 1] = 1.0f;
    }
    return;
  }
  x += row * c.columns;
  OnlineSum online;
  float total = 0.0f;
  each_vector<T, kVec>(x, c.columns, [&](const Packed<kVec, T>& in, int64_t) {
    float v[kVec];
#pragma unroll
    for (int k = 0; k < kVec; ++k) {
      v[k] = in[k];
      total += v[k];
    }
    online.add(v);
  });
  RowStats s;
  s.largest = BlockTeam::largest(online.largest);
  s.sum = BlockTeam::sum(online.sum_at(s.largest));
  if (c.smoothing != 0.0f) total = BlockTeam::sum(total);
  if (threadIdx.x == 0) {
    stats[2 * row] = s.largest;
    stats[2 * row + 1] = s.sum;
    loss[row] = row_loss(c, s, to_float(T{}, x[label]), total);
  }
}

// dx may be x: an element, the label's too, is written by the thread that read it.
template <class T, int kVec>
__global__ void __launch_bounds__(kThreads)
    gradient_kernel(typename T::Raw* dx, const typename T::Raw* x, const int64_t* labels, const float* stats, const float* weights, float weight,
                    CrossEntropy c) {
  const int64_t row = blockIdx.x, label = labels[row];
  const float w = is_out_of_range(c, label) ? NAN : weights != nullptr ? weights[row] : weight;
  const bool nothing = label == c.ignored || w == 0.0f;
  const RowStats s{stats[2 * row], stats[2 * row + 1]};
  const RowGradient g(c, s, w);
  x += row * c.columns;
  dx += row * c.columns;
  if (nothing) {
    const float none[kVec] = {};
    for (int64_t i = int64_t{threadIdx.x} * kVec; i < c.columns; i += int64_t{kThreads} * kVec) store_vector(T{}, none, dx + i);
    return;
  }
  each_vector<T, kVec>(x, c.columns, [&](const Packed<kVec, T>& in, int64_t i) {
    float v[kVec];
#pragma unroll
    for (int k = 0; k < kVec; ++k) {
      const float e = exp_for<T>(in[k] - s.largest);
      v[k] = i + k == label ? g.at_label(e) : fmaf(e, g.factor, -g.everywhere);
    }
    store_vector(T{}, v, dx + i);
  });
}

bool any_rows(const CrossEntropy& c, int64_t rows) {
  DS_CHECK_VALUE(rows >= 0, "rows must not be negative, got " << rows);
  DS_CHECK_VALUE(rows == 0 || c.columns > 0, "columns must be positive, got " << c.columns);
  return rows != 0;
}

}  // namespace

void cross_entropy(float* loss, float* stats, const void* x, DType dtype, const int64_t* labels, const CrossEntropy& c, int64_t rows,
                   cudaStream_t stream, const LabelReport& report) {
  if (!any_rows(c, rows)) return;
  check_arrays(rows, {{loss, "loss"}, {stats, "stats"}, {x, "x"}, {labels, "labels"}});
  dispatch_float(dtype, "x", [&](auto tag) {
    using T = decltype(tag);
    with_vector<T>(aligned({x}) && c.columns % kVecOf<T> == 0, [&](auto vec) {
      launch("cross_entropy", loss_kernel<T, decltype(vec)::value>, rows, stream, loss, stats, static_cast<const typename T::Raw*>(x), labels, c, report);
    });
  });
}

void cross_entropy_backward(void* dx, const void* x, DType dtype, const int64_t* labels, const float* stats, const float* weights,
                            float weight, const CrossEntropy& c, int64_t rows, cudaStream_t stream) {
  if (!any_rows(c, rows)) return;
  check_arrays(rows, {{dx, "dx"}, {x, "x"}, {labels, "labels"}, {stats, "stats"}});
  dispatch_float(dtype, "x", [&](auto tag) {
    using T = decltype(tag);
    with_vector<T>(aligned({dx, x}) && c.columns % kVecOf<T> == 0, [&](auto vec) {
      launch("cross_entropy_backward", gradient_kernel<T, decltype(vec)::value>, rows, stream, static_cast<typename T::Raw*>(dx),
             static_cast<const typename T::Raw*>(x), labels, stats, weights, weight, c);
    });
  });
}

}  // namespace ds::kernels
