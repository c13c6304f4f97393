// SPDX-License-Identifier: Apache-2.0
// Lists of tensors, checked and turned into what kernels take: one row of pointers a parameter.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <optional>
#include <vector>

#include "kernels/optim/stored.h"

namespace ds::optim {

using Tensors = std::vector<at::Tensor>;

// Which random bits stochastic rounding takes: parameter k of the list is number numbers[k] of its optimizer (below 2^24), its element i is
// element numbers[k] * 2^40 + i of update `draw`. So neither the list nor its order matters.
struct Rounding {
  uint64_t seed = 0, draw = 0;
  std::vector<int64_t> numbers;
};

// How parameters and states are kept, where dtypes do not say it. Bfloat16 parameters with `low_bits` (int16, shaped like them) are the weights of
// split masters; with `rounding` they are rounded stochastically. States that are int8 (signed) or uint8 (unsigned) are 8-bit codes, and
// scales[k] then holds for the k-th kind of state one float32 tensor a parameter, of ceil(numel / 256) elements; it is empty where states are floats.
struct Storage {
  Tensors low_bits;
  std::vector<Tensors> scales;
  std::optional<Rounding> rounding;
};

struct NamedStates {
  const char* name;
  const Tensors* tensors;
};

struct Row {
  kernels::Slice slice;
  int64_t numel = 0;
};

// The rows of a list, on one device; `held` keeps gradients alive that had to be copied to be laid out like their parameter.
struct Rows {
  std::vector<Row> rows;
  Tensors held;
  at::Device device = at::kCPU;
  bool empty() const { return rows.empty(); }
};

// Refuses what has no memory to give to a kernel: sparse and nested tensors, and subclasses (DTensors), whose data pointers are null.
void check_memory(const at::Tensor& t, const char* name, size_t index);

// Everything is checked before anything is returned; errors name the list and the index. Parameters without elements make no row.
// keep_empty: they make one.
Rows checked_rows(const Tensors& params, const Tensors& grads, const std::vector<NamedStates>& states, const Storage& storage,
                  bool keep_empty = false);

// body(row, begin, end) for all elements of all rows, over torch's threads: many small rows are one piece of work, a large row is several. Cuts are
// at multiples of kRowPiece elements of a row whatever the number of threads.
constexpr int64_t kRowPiece = int64_t{1} << 18;  // a multiple of the 8-bit blocks
void for_row_pieces(const std::vector<int64_t>& numels, const std::function<void(size_t row, int64_t begin, int64_t end)>& body);

}  // namespace ds::optim
