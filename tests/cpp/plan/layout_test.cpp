// SPDX-License-Identifier: Apache-2.0
#include "plan/layout.h"

#include <gtest/gtest.h>

#include <random>

#include "base/error.h"

namespace {

using namespace ds::plan;

TEST(Layout, SlotsAreAlignedAndShardsEqual) {
  const FlatLayout layout = plan_flat({1, 7, 0, 64, 65}, 3, 16);
  EXPECT_EQ(layout.slots[0].offset, 0);
  EXPECT_EQ(layout.slots[1].offset, 16);
  EXPECT_EQ(layout.slots[2].offset, 32);
  EXPECT_EQ(layout.slots[3].offset, 32);
  EXPECT_EQ(layout.slots[4].offset, 96);
  EXPECT_EQ(layout.shard_numel % 16, 0);
  EXPECT_GE(layout.numel(), 96 + 65);
}

TEST(Layout, RefusesNonsense) {
  EXPECT_THROW(plan_flat({1}, 0, 16), ds::Error);
  EXPECT_THROW(plan_flat({1}, 1, 0), ds::Error);
  EXPECT_THROW(plan_flat({-1}, 1, 16), ds::Error);
  EXPECT_THROW(plan_flat({INT64_MAX, 2}, 1, 16), ds::Error);
  EXPECT_THROW(slice_of(plan_flat({4}, 2, 1), 0, 2), ds::Error);
}

// Every element of every parameter is owned by exactly one rank, in order, and padding is what is left.
TEST(Layout, SlicesCoverEveryParameterOnce) {
  std::mt19937 random(7);
  for (int round = 0; round < 500; ++round) {
    std::vector<int64_t> numels(random() % 9 + 1);
    for (int64_t& n : numels) n = random() % 200;
    const int world = static_cast<int>(random() % 7) + 1;
    const FlatLayout layout = plan_flat(numels, world, int64_t{1} << (random() % 7));
    int64_t used = 0;
    for (size_t slot = 0; slot < numels.size(); ++slot) {
      int64_t next = 0;
      for (int rank = 0; rank < world; ++rank) {
        const Slice slice = slice_of(layout, static_cast<int64_t>(slot), rank);
        if (slice.numel == 0) continue;
        ASSERT_EQ(slice.param_begin, next);
        ASSERT_EQ(rank * layout.shard_numel + slice.shard_begin, layout.slots[slot].offset + slice.param_begin);
        ASSERT_LE(slice.shard_begin + slice.numel, layout.shard_numel);
        next += slice.numel;
      }
      ASSERT_EQ(next, numels[slot]);
      used += next;
    }
    int64_t padding = 0;
    for (const Slot& gap : padding_of(layout)) padding += gap.numel;
    ASSERT_EQ(used + padding, layout.numel());
  }
}

}  // namespace
