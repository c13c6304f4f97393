// SPDX-License-Identifier: Apache-2.0
// A tensor's elements in pieces: whether the pieces make up the whole, and which of them hold a wanted run. Integers only.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "base/span.h"

namespace ds::plan {

// Elements [begin, begin + numel) of a tensor in row-major order.
struct Run {
  int64_t begin = 0;
  int64_t numel = 0;
};

// Part of a wanted run that lies in one piece.
struct Part {
  int64_t piece = 0;        // which piece
  int64_t piece_begin = 0;  // first element, counted from the start of the piece
  int64_t want_begin = 0;   // the same element, counted from the start of the wanted run
  int64_t numel = 0;
};

// Empty when the runs, in ascending order, cover [0, numel) exactly once and none is empty; else what is wrong, in words.
std::string cover_problem(Span<const Run> pieces, int64_t numel);

// The parts of `want` in ascending order, from pieces without a cover_problem.
std::vector<Part> parts_of(Span<const Run> pieces, const Run& want);

}  // namespace ds::plan
