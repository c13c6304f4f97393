// SPDX-License-Identifier: Apache-2.0
// Where each parameter lies in a flat, and which part of the flat each rank owns. Integers only.
#pragma once

#include <cstdint>
#include <vector>

namespace ds::plan {

// One parameter inside a flat; offset and numel in elements of the flat's dtype.
struct Slot {
  int64_t offset = 0;
  int64_t numel = 0;
};

// A flat is a run of parameters of one dtype that is cut into `world` equal shards. Slots start at multiples of
// the alignment; the elements between slots and after the last one are padding and stay zero for ever.
struct FlatLayout {
  std::vector<Slot> slots;
  int64_t shard_numel = 0;
  int world = 1;

  int64_t numel() const { return shard_numel * world; }
};

// A contiguous run of one parameter's elements: [param_begin, param_begin + numel) of the parameter, which lies at
// shard_begin inside the shard that owns it.
struct Slice {
  int64_t param_begin = 0;
  int64_t shard_begin = 0;
  int64_t numel = 0;
};

// Lays parameters of the given sizes one behind the other. Shards are multiples of `align_numel` too.
FlatLayout plan_flat(const std::vector<int64_t>& numels, int world, int64_t align_numel);

// The part of slot `slot` that rank `rank` owns (numel 0 when none).
Slice slice_of(const FlatLayout& layout, int64_t slot, int rank);

// The padding runs of a flat, as (begin, numel) pairs in ascending order.
std::vector<Slot> padding_of(const FlatLayout& layout);

}  // namespace ds::plan
