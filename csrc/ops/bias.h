// SPDX-License-Identifier: Apache-2.0
// What operators with a bias over the last dimension share: the bias in float32, rows cut at fixed places, and the bias's gradient joined from
// one partial sum a chunk, so that the number of threads changes no bit.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <vector>

#include "kernels/reduce/reduce.h"
#include "ops/arguments.h"
#include "ops/float_vector.h"

namespace ds::ops {

// [.., cols] as rows.
struct Rows {
  int64_t rows, cols;
};

// Without a bias the shape does not matter: one long row.
inline Rows rows_of(const at::Tensor& x, const at::Tensor& bias, int64_t parts = 1) {
  if (!bias.defined() && parts == 1) return {1, x.numel()};
  const int64_t cols = x.size(-1);
  return {cols == 0 ? 0 : x.numel() / cols, cols / parts};
}

constexpr int64_t kChunkElements = 32768;

// Chunks of a long row, or of rows without sums.
inline int64_t rows_in_chunk(int64_t cols) { return std::max<int64_t>(1, kChunkElements / std::max<int64_t>(1, cols)); }

// Column sums of rows, one partial vector of `cols` a chunk of rows; at most 64 of them, whatever the number of rows.
class ColumnSums {
 public:
  ColumnSums(int64_t rows, int64_t cols)
      : cols_(cols), chunk_((std::max(rows_in_chunk(cols), chunks_of(rows, 64)) + 3) / 4 * 4), count_(chunks_of(rows, chunk_)),
        parts_(at::zeros({count_, cols}, at::kFloat)) {}
  int64_t chunk() const { return chunk_; }
  float* part(int64_t index) { return parts_.mutable_data_ptr<float>() + index * cols_; }

  // Adds the parts in order and writes the sums in the dtype of `like`, whose shape is [cols].
  at::Tensor join(const at::Tensor& like) const {
    std::vector<float> sums(static_cast<size_t>(cols_));
    for_chunks(cols_, 1024, [&](int64_t, int64_t begin, int64_t end) {
      double block[1024] = {};
      for (int64_t p = 0; p < count_; ++p) {
        const float* part = parts_.const_data_ptr<float>() + p * cols_;
        for (int64_t c = begin; c < end; ++c) block[c - begin] += part[c];
      }
      for (int64_t c = begin; c < end; ++c) sums[static_cast<size_t>(c)] = static_cast<float>(block[c - begin]);
    });
    at::Tensor out = at::empty({cols_}, like.options());
    kernels::copy_scale(out.mutable_data_ptr(), to_dtype(like.scalar_type()), sums.data(), DType::F32, 1.0f, cols_);
    return out;
  }

 private:
  int64_t cols_, chunk_, count_;
  at::Tensor parts_;
};

// The gradient of a bias that is not there.
inline at::Tensor no_gradient(const at::Tensor& like) { return at::empty({0}, like.options()); }

}  // namespace ds::ops
