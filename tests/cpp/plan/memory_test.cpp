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

Partition offloaded(int stage, int ranks, Tier states, Tier params, bool on_host) {
  Partition p = partition(stage, ranks);
  p.offload.states = states;
  p.offload.params = params;
  p.on_host = on_host;
  return p;
}

int64_t resting(const MemoryUse& use) { return use.parameters + use.gradients + use.master_weights + use.optimizer_state; }

TEST(Offload, MovesAndLosesNothing) {
  const ModelSizes model = model_of(6, kMega, kMega, 2);
  const MemoryUse without = device(model, 3, 4);
  for (Tier tier : {Tier::Host, Tier::File}) {
    const Estimate with = estimate(model, kBlocks, offloaded(3, 4, tier, tier, false));
    EXPECT_EQ(resting(with.device), 0);
    EXPECT_EQ(with.device.total(), without.gathered_units + without.buckets);
    EXPECT_EQ(resting(tier == Tier::Host ? with.host : with.file), resting(without));
    EXPECT_EQ(resting(tier == Tier::Host ? with.file : with.host), 0);
    EXPECT_GT(with.host.staging, 0);
  }
}

TEST(Offload, TheHostIsWhereItsRanksAre) {
  const ModelSizes model = model_of(6, kMega, kMega, 2);
  const Estimate plain = estimate(model, kBlocks, offloaded(3, 4, Tier::Device, Tier::Device, true));
  const Estimate host = estimate(model, kBlocks, offloaded(3, 4, Tier::Host, Tier::Host, true));
  EXPECT_EQ(host.device.total(), plain.device.total());
  EXPECT_EQ(host.host.total() + host.file.total() + host.device.staging, 0);
  EXPECT_EQ(host.tiers.to_host + host.tiers.from_host + host.tiers.mapped_read, 0);
}

TEST(Offload, FilesOfRanksOnTheHost) {
  const ModelSizes model = model_of(6, 4 * kMega, 4 * kMega, 2);   // 32 M elements, 8 M a rank: 1 M in each flat
  const int64_t n = 32 * kMega / 4;
  const Estimate found = estimate(model, kBlocks, offloaded(3, 4, Tier::File, Tier::File, true));
  EXPECT_EQ(resting(found.device), 0);
  EXPECT_EQ(found.file.parameters, 2 * n);
  EXPECT_EQ(found.file.gradients, 4 * n);
  EXPECT_EQ(found.file.master_weights, 4 * n);
  EXPECT_EQ(found.file.optimizer_state, 8 * n);
  EXPECT_EQ(found.tiers.file_read + found.tiers.file_written, 24 * n);
  EXPECT_EQ(found.tiers.mapped_read, 4 * n + 2 * 2 * n);       // gradients for the step; shards in forward and backward
  EXPECT_EQ(found.tiers.mapped_written, 4 * n + 2 * n);
  EXPECT_EQ(found.device.staging, 8 * 3 * (int64_t{2} << 20));  // slots of a master and two states
  EXPECT_EQ(found.tiers.to_host + found.tiers.from_host, 0);
}

TEST(Offload, SplitMastersAreTwoBytesBesideTheWeights) {
  const ModelSizes model = model_of(6, 4 * kMega, 4 * kMega, 2);   // as above
  const int64_t n = 32 * kMega / 4, tile = int64_t{2} << 20;
  const auto split = [&](int stage, Tier states, Tier params, bool on_host) {
    Partition p = offloaded(stage, 4, states, params, on_host);
    p.split_master = true;
    return estimate(model, kBlocks, p);
  };
  Estimate found = split(3, Tier::Device, Tier::Device, true);
  EXPECT_EQ(found.device.parameters + found.device.master_weights + found.device.optimizer_state, 12 * n);
  found = split(3, Tier::File, Tier::File, true);
  EXPECT_EQ(found.file.master_weights, 2 * n);
  EXPECT_EQ(found.tiers.file_read + found.tiers.file_written, 20 * n);
  EXPECT_EQ(found.tiers.mapped_read, 4 * n + 2 * 2 * n + 2 * n);   // the step reads the weights, too
  EXPECT_EQ(found.device.staging, 8 * (2 * tile + tile / 2));
  found = split(2, Tier::Host, Tier::Device, false);
  EXPECT_EQ(found.tiers.from_host, 2 * n);
  EXPECT_EQ(found.tiers.to_host, 2 * n + 2 * n);   // gradients, and the weights for the step
  Partition p = offloaded(3, 4, Tier::Host, Tier::Device, false);
  p.split_master = true;
  EXPECT_EQ(estimate(model_of(6, kMega, kMega, 4), kBlocks, p).host.master_weights, 4 * 8 * kMega / 4);   // fp32 parameters are not split
}

TEST(Offload, TilesAreAsManyAsThereAreOrBuffers) {
  Partition p = offloaded(2, 4, Tier::File, Tier::Device, true);
  const ModelSizes model = model_of(1, 4 * kMega, 64 * 4, 2);   // tiles: two of 2 MiB an array and two of a page
  EXPECT_EQ(estimate(model, kBlocks, p).device.staging, 4 * 3 * (int64_t{2} << 20));
  p.offload.tiles = {int64_t{1} << 20, 5};
  EXPECT_EQ(estimate(model, kBlocks, p).device.staging, 5 * 3 * (int64_t{1} << 20));
}

TEST(Offload, TilesFillTheirMemoryWithWholeRequests) {
  constexpr int64_t kMiB = int64_t{1} << 20;
  for (const int64_t count : {0, 1, 3, 4, 12, 1000}) {
    for (const int64_t block : {int64_t{4096}, kMiB / 2, kMiB, 3 * kMiB / 2, 2 * kMiB, 3 * kMiB + 4096, 4 * kMiB, 64 * kMiB}) {
      const StepTiles tiles = step_tiles(count, block);
      EXPECT_EQ(tiles.tile_bytes % 4096, 0);
      EXPECT_TRUE(tiles.tile_bytes >= 2 * kMiB && tiles.tile_bytes <= 4 * kMiB);
      EXPECT_TRUE(tiles.tile_bytes % block == 0 || tiles.tile_bytes == 4 * kMiB || tiles.tile_bytes == 2 * kMiB) << block;
      EXPECT_GE(tiles.buffers, kFewestTiles);
      EXPECT_TRUE(tiles.buffers == kFewestTiles || tiles.buffers * tiles.tile_bytes <= std::max<int64_t>(count, 1) * 4 * kMiB);
    }
  }
  EXPECT_EQ(step_tiles(4, kMiB).buffers, 8);
}

TEST(Offload, FullPrecisionStreamsTwoArraysOnTheHost) {
  const ModelSizes model = model_of(6, kMega, kMega, 4);
  const int64_t n = 8 * kMega / 4;
  Estimate found = estimate(model, kBlocks, offloaded(3, 4, Tier::File, Tier::File, true));
  EXPECT_EQ(found.file.master_weights, 0);
  EXPECT_EQ(found.tiers.file_read, 8 * n);
  EXPECT_EQ(found.tiers.mapped_read, 4 * n + 4 * 2 * n + 4 * n);   // the step reads the parameter itself
  found = estimate(model, kBlocks, offloaded(2, 4, Tier::Host, Tier::Device, false));
  EXPECT_EQ(found.host.master_weights, 4 * n);   // on the accelerator the parameter, on the host its master
  found = estimate(model, kBlocks, offloaded(3, 4, Tier::Host, Tier::Host, false));
  EXPECT_EQ(found.host.master_weights, 0);       // the parameter is on the host itself
  found = estimate(model, kBlocks, offloaded(3, 4, Tier::File, Tier::File, false));
  EXPECT_EQ(found.tiers.file_read, 8 * n);
  EXPECT_EQ(found.tiers.from_host, 2 * 4 * n);
}

TEST(Offload, AnAccelerator) {
  const ModelSizes model = model_of(6, kMega, kMega, 2);
  const int64_t n = 8 * kMega / 4;
  Partition p = offloaded(2, 4, Tier::Host, Tier::Device, false);
  p.accumulation = 3;
  Estimate found = estimate(model, kBlocks, p);
  EXPECT_EQ(found.device.parameters, 2 * 8 * kMega);
  EXPECT_EQ(found.device.gradients + found.device.master_weights + found.device.optimizer_state + found.device.staging, 0);
  EXPECT_EQ(found.tiers.to_host, 3 * 2 * n);     // gradients of each micro-batch in the type they are reduced in
  EXPECT_EQ(found.tiers.from_host, 2 * n);       // weights once
  EXPECT_EQ(found.tiers.file_read + found.tiers.mapped_read, 0);
  p.reduce_bytes = 4;
  EXPECT_EQ(estimate(model, kBlocks, p).tiers.to_host, 3 * 4 * n);
  // Shards on the host go up for forward and backward; the states follow them.
  p = offloaded(3, 4, Tier::Device, Tier::Host, false);
  found = estimate(model, kBlocks, p);
  EXPECT_EQ(resting(found.device), 0);
  EXPECT_EQ(resting(found.host), 18 * n);
  EXPECT_EQ(found.tiers.from_host, 2 * 2 * n);
  p.offload.states = Tier::File;
  found = estimate(model, kBlocks, p);
  EXPECT_EQ(found.host.parameters, 2 * n);
  EXPECT_EQ(resting(found.file), 16 * n);
}

TEST(Offload, OneRankFreesItsShardsToo) {
  const ModelSizes model = model_of(6, kMega, kMega, 2);
  const Estimate found = estimate(model, kBlocks, offloaded(3, 1, Tier::File, Tier::File, true));
  EXPECT_EQ(found.device.gathered_units, 2 * kMega);
  EXPECT_EQ(found.file.parameters, 2 * 8 * kMega);
  EXPECT_TRUE(found.traffic.empty());
}

TEST(Offload, ShareAndWhatStaysInMemory) {
  const ModelSizes model = model_of(6, kMega, kMega, 2);
  const int64_t n = 8 * kMega / 4;
  Partition p = offloaded(3, 4, Tier::File, Tier::File, true);
  const Estimate all = estimate(model, kBlocks, p);
  p.offload.states_share = 0.5;
  p.offload.params_in_memory = n / 4;
  Estimate found = estimate(model, kBlocks, p);
  EXPECT_EQ(found.file.optimizer_state, all.file.optimizer_state / 2);
  EXPECT_EQ(found.device.optimizer_state, all.file.optimizer_state / 2);
  EXPECT_EQ(found.device.parameters, 2 * n / 4);
  EXPECT_EQ(found.tiers.file_read, all.tiers.file_read / 2);
  p.offload.states_share = 0;
  p.offload.params_in_memory = n;
  found = estimate(model, kBlocks, p);
  EXPECT_EQ(found.file.total() + found.device.staging, 0);
}

TEST(Offload, BadRequestsAreRefused) {
  const ModelSizes model = model_of(1, kMega, kMega, 2);
  EXPECT_THROW(estimate(model, kBlocks, offloaded(0, 2, Tier::Host, Tier::Device, false)), ds::ValueError);
  EXPECT_THROW(estimate(model, kBlocks, offloaded(2, 2, Tier::Host, Tier::Host, false)), ds::ValueError);
  Partition p = offloaded(2, 2, Tier::File, Tier::Device, false);
  p.offload.states_share = 1.5;
  EXPECT_THROW(estimate(model, kBlocks, p), ds::ValueError);
  p.offload.states_share = 1;
  p.offload.tiles = {5000, 4};
  EXPECT_THROW(estimate(model, kBlocks, p), ds::ValueError);
  p.offload.tiles = {4096, 2};
  EXPECT_THROW(estimate(model, kBlocks, p), ds::ValueError);
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
