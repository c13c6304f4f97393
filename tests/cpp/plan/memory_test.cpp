// SPDX-License-Identifier: Apache-2.0
#include "plan/memory.h"

#include <gtest/gtest.h>

#include "base/error.h"
#include "plan/reserve.h"

namespace {

using namespace ds::plan;

constexpr int64_t kMega = int64_t{1} << 20;

// root{ embedding, blocks[ block, ... ] (a list), head }, every parameter of a multiple of 64 * ranks elements.
ModelSizes model_of(int blocks, int64_t block_numel, int64_t edge_numel, int64_t element_bytes, bool trainable = true) {
  ModelSizes model;
  const auto add = [&](Module module) {
    model.tree.push_back(module);
    model.params.emplace_back();
    if (module.own_numel > 0) model.params.back().push_back({module.own_numel, element_bytes, trainable});
  };
  add({-1, 0});
  add({0, edge_numel});
  add({0, 0, /*container=*/true});
  for (int b = 0; b < blocks; ++b) add({2, block_numel, false, /*repeated=*/true});
  add({0, edge_numel});
  return model;
}

// Every block and each end is a unit.
constexpr UnitBudget kBlocks{1, 4 * kMega};

Partition partition(int stage, int ranks) {
  Partition p;
  p.ranks = ranks;
  p.partial_step = stage >= 1;
  p.shard_params = stage == 3;
  p.prefetch = false;
  return p;
}

MemoryUse device(const ModelSizes& model, int stage, int ranks) { return estimate(model, kBlocks, partition(stage, ranks)).device; }

TEST(Memory, LowPrecisionByKind) {
  const ModelSizes model = model_of(6, kMega, 2 * kMega, 2);
  const int64_t n = 10 * kMega;
  for (int stage : {0, 1, 2}) {
    const MemoryUse use = device(model, stage, 4);
    const int64_t owned = stage == 0 ? n : n / 4;
    EXPECT_EQ(use.parameters, 2 * n);
    EXPECT_EQ(use.gradients, 4 * owned);
    EXPECT_EQ(use.master_weights, 4 * owned);
    EXPECT_EQ(use.optimizer_state, 8 * owned);
    EXPECT_EQ(use.gathered_units, 0);
    EXPECT_EQ(use.buckets, bucket_bytes(2 * 2 * kMega).total);
  }
  const MemoryUse use = device(model, 3, 4);
  EXPECT_EQ(use.parameters, 2 * n / 4);
  EXPECT_EQ(use.gradients + use.master_weights + use.optimizer_state, 16 * n / 4);
}

TEST(Memory, FullPrecisionNeedsNoMaster) {
  const MemoryUse use = device(model_of(3, kMega, kMega, 4), 2, 2);
  EXPECT_EQ(use.parameters, 4 * 5 * kMega);
  EXPECT_EQ(use.master_weights, 0);
}

TEST(Memory, FrozenParametersOnlyRest) {
  const MemoryUse use = device(model_of(3, kMega, kMega, 2, /*trainable=*/false), 3, 2);
  EXPECT_EQ(use.parameters, 2 * 5 * kMega / 2);
  EXPECT_EQ(use.gradients + use.master_weights + use.optimizer_state + use.buckets, 0);
  EXPECT_GT(use.gathered_units, 0);
}

TEST(Memory, PaddingIsCounted) {
  const MemoryUse use = device(model_of(0, 0, 65, 4), 2, 2);   // 65 -> 128 elements, one shard of 64 each
  EXPECT_EQ(use.parameters, 4 * 2 * 128);
  EXPECT_EQ(use.gradients, 4 * 2 * 64);
}

TEST(Memory, OneUnitIsGatheredOrTwo) {
  const ModelSizes model = model_of(6, kMega, kMega, 2);
  EXPECT_EQ(device(model, 3, 4).gathered_units, 2 * kMega);   // shared memory: gathered when used
  Partition ahead = partition(3, 4);
  ahead.prefetch = true;
  EXPECT_EQ(estimate(model, kBlocks, ahead).device.gathered_units, 2 * 2 * kMega);
}

TEST(Memory, PersistentUnitsStayGathered) {
  Partition p = partition(3, 4);
  p.persistent_numel = kMega;
  const Estimate found = estimate(model_of(6, kMega, kMega, 2), kBlocks, p);
  EXPECT_EQ(found.device.gathered_units, 8 * 2 * kMega);
  for (const Traffic& t : found.traffic) EXPECT_TRUE(t.phase == "reduce" || t.phase == "gather_updated") << t.phase;
}

TEST(Memory, OneRankDividesNothing) {
  const ModelSizes model = model_of(3, kMega, kMega, 2);
  for (int stage : {0, 1, 2, 3}) {
    EXPECT_EQ(device(model, stage, 1).total(), device(model, 0, 1).total());
    EXPECT_TRUE(estimate(model, kBlocks, partition(stage, 1)).traffic.empty());
  }
}

TEST(Memory, MoreRanksNeverNeedMore) {
  const ModelSizes model = model_of(12, kMega + 77, 3 * kMega + 5, 2);
  for (int stage : {1, 2, 3}) {
    int64_t before = device(model, stage, 1).optimizer_state;
    for (int ranks : {2, 3, 8, 64}) {
      const int64_t now = device(model, stage, ranks).optimizer_state;
      EXPECT_LT(now, before) << "stage " << stage << ", " << ranks << " ranks";
      before = now;
    }
  }
}

TEST(Memory, OffloadMovesAndLosesNothing) {
  const ModelSizes model = model_of(6, kMega, kMega, 2);
  Partition p = partition(3, 4);
  const MemoryUse without = estimate(model, kBlocks, p).device;
  p.offload_states = true;
  p.offload_params = true;
  const Estimate with = estimate(model, kBlocks, p);
  EXPECT_EQ(with.device.total() + with.host.total(), without.total());
  EXPECT_EQ(with.device.total(), without.gathered_units + without.buckets);
}

int64_t moved(const Estimate& found, const std::string& phase) {
  for (const Traffic& t : found.traffic) {
    if (t.phase == phase) return t.bytes;
  }
  return 0;
}

TEST(Traffic, TwoOrThreeTimesTheModel) {
  const ModelSizes model = model_of(6, kMega, kMega, 2);
  const int64_t bytes = 2 * 8 * kMega;
  for (int stage : {1, 2, 3}) {
    Partition p = partition(stage, 4);
    p.accumulation = 3;
    const Estimate found = estimate(model, kBlocks, p);
    EXPECT_EQ(moved(found, "reduce"), 3 * bytes);
    EXPECT_EQ(moved(found, "gather_updated"), stage == 3 ? 0 : bytes);
    EXPECT_EQ(moved(found, "gather_forward") + moved(found, "gather_backward"), stage == 3 ? 2 * 3 * bytes : 0);
    for (const Traffic& t : found.traffic) EXPECT_EQ(t.sent_bytes, t.bytes / 4 * 3);
  }
  EXPECT_EQ(moved(estimate(model, kBlocks, partition(0, 4)), "gather_grads"), 4 * 8 * kMega);
}

TEST(Memory, BadRequestsAreRefused) {
  ModelSizes model = model_of(1, kMega, kMega, 2);
  Partition p = partition(2, 2);
  p.ranks = 0;
  EXPECT_THROW(estimate(model, kBlocks, p), ds::ValueError);
  p = partition(2, 2);
  p.accumulation = 0;
  EXPECT_THROW(estimate(model, kBlocks, p), ds::ValueError);
  p = partition(0, 2);
  p.shard_params = true;
  EXPECT_THROW(estimate(model, kBlocks, p), ds::ValueError);
  model.params[1][0].numel += 1;
  EXPECT_THROW(estimate(model, kBlocks, partition(2, 2)), ds::ValueError);
  model.params.pop_back();
  EXPECT_THROW(estimate(model, kBlocks, partition(2, 2)), ds::ValueError);
}

TEST(Reserve, PoolTakesTheSmallestThatFits) {
  EXPECT_EQ(best_free_buffer({}, 10), -1);
  EXPECT_EQ(best_free_buffer({5, 30, 20}, 10), 2);
  EXPECT_EQ(best_free_buffer({100 * kMega}, 10 * kMega), -1);   // ten times too large: stays for those who need it
  EXPECT_EQ(pool_buffer_bytes(3 * kMega, true), 4 * kMega);
  EXPECT_EQ(pool_buffer_bytes(3 * kMega, false), 3 * kMega);
}

}  // namespace
