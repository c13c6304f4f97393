// SPDX-License-Identifier: Apache-2.0
#include "plan/layout.h"

#include <algorithm>

#include "base/checked.h"
#include "base/error.h"

namespace ds::plan {

FlatLayout plan_flat(const std::vector<int64_t>& numels, int world, int64_t align_numel) {
  DS_CHECK(world >= 1, "plan_flat: world must be at least 1, got " << world);
  DS_CHECK(align_numel >= 1, "plan_flat: align_numel must be at least 1, got " << align_numel);
  FlatLayout layout;
  layout.world = world;
  int64_t end = 0;
  for (int64_t numel : numels) {
    DS_CHECK(numel >= 0, "plan_flat: negative parameter size " << numel);
    layout.slots.push_back({end, numel});
    end = round_up(checked_add(end, numel), align_numel);
  }
  const int64_t per_rank = end / world + (end % world != 0);
  layout.shard_numel = round_up(per_rank, align_numel);
  return layout;
}

Slice slice_of(const FlatLayout& layout, int64_t slot, int rank) {
  DS_CHECK(rank >= 0 && rank < layout.world, "slice_of: rank " << rank << " outside world " << layout.world);
  const Slot& s = layout.slots.at(static_cast<size_t>(slot));
  const int64_t shard_begin = layout.shard_numel * rank;
  const int64_t begin = std::max(s.offset, shard_begin);
  const int64_t end = std::min(s.offset + s.numel, shard_begin + layout.shard_numel);
  if (begin >= end) return {};
  return {begin - s.offset, begin - shard_begin, end - begin};
}

std::vector<Slot> padding_of(const FlatLayout& layout) {
  std::vector<Slot> gaps;
  int64_t end = 0;
  for (const Slot& s : layout.slots) {
    if (s.offset > end) gaps.push_back({end, s.offset - end});
    end = s.offset + s.numel;
  }
  if (layout.numel() > end) gaps.push_back({end, layout.numel() - end});
  return gaps;
}

}  // namespace ds::plan
