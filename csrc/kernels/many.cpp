// SPDX-License-Identifier: Apache-2.0
#include "kernels/many.h"

#include <algorithm>
#include <limits>

#include "base/error.h"

namespace ds::kernels {
namespace {

constexpr int64_t kUnit = 1024, kLargest = int64_t{1} << 16, kWanted = 8192;

int64_t round_up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }

}  // namespace

ManyPlan plan_many(const std::vector<int64_t>& numels, int64_t entry_bytes) {
  ManyPlan plan;
  plan.rows = static_cast<int64_t>(numels.size());
  int64_t total = 0;
  for (int64_t n : numels) {
    DS_CHECK_VALUE(n >= 0, "numels must not be negative, got " << n);
    total += n;
  }
  plan.chunk_numel = std::clamp(round_up(total / kWanted, kUnit), kUnit, kLargest);
  for (int64_t n : numels) plan.chunks += (n + plan.chunk_numel - 1) / plan.chunk_numel;
  DS_CHECK_VALUE(std::max(plan.rows, plan.chunks) <= std::numeric_limits<int32_t>::max(), "too many elements for one launch: " << total);
  plan.chunks_offset = round_up(plan.rows * entry_bytes, 16);
  plan.bytes = round_up(plan.chunks_offset + plan.chunks * static_cast<int64_t>(sizeof(ManyChunk)), 16);
  return plan;
}

void write_chunks(const ManyPlan& plan, const std::vector<int64_t>& numels, void* table) {
  auto* chunk = reinterpret_cast<ManyChunk*>(static_cast<char*>(table) + plan.chunks_offset);
  for (size_t row = 0; row < numels.size(); ++row) {
    const int64_t count = (numels[row] + plan.chunk_numel - 1) / plan.chunk_numel;
    for (int64_t k = 0; k < count; ++k) *chunk++ = {static_cast<int32_t>(row), static_cast<int32_t>(k)};
  }
}

}  // namespace ds::kernels
