// SPDX-License-Identifier: Apache-2.0
#include "plan/memory.h"

#include <algorithm>
#include <map>
#include <utility>

#include "base/checked.h"
#include "base/error.h"
#include "plan/layout.h"
#include "plan/reserve.h"
#include "plan/resting.h"

namespace ds::plan {
namespace {

constexpr int64_t kFloatBytes = 4;

struct FlatSize {
  FlatLayout layout;
  int64_t element_bytes = 4;
  bool trainable = true;
  Tier states = Tier::Device;
  Tier params = Tier::Device;
  int64_t full_bytes() const { return layout.numel() * element_bytes; }
  int64_t shard_bytes() const { return layout.shard_numel * element_bytes; }
};

struct UnitSize {
  std::vector<FlatSize> flats;
  int64_t numel = 0;
  int64_t trained_numel = 0;
  bool persistent = false;
  int first = 0;   // the pre-order positions between which it is in use: [first, last)
  int last = 0;
};

// A gradient element on its way to the reduction.
int64_t reduced_bytes(const FlatSize& flat, const Partition& p) { return p.reduce_bytes > 0 ? p.reduce_bytes : flat.element_bytes; }

// One past the last module of each subtree.
std::vector<int> subtree_ends(const std::vector<Module>& tree) {
  std::vector<int> ends(tree.size());
  for (size_t i = 0; i < tree.size(); ++i) ends[i] = static_cast<int>(i) + 1;
  for (size_t i = tree.size(); i-- > 1;) ends[tree[i].parent] = std::max(ends[tree[i].parent], ends[i]);
  return ends;
}

// Like the store: one flat for each (trainable, type), the trainable ones first, in order of appearance.
std::vector<FlatSize> flats_of(const std::vector<ParamSize>& params, const Partition& p) {
  std::map<std::pair<bool, int64_t>, std::vector<int64_t>> groups;
  for (const ParamSize& param : params) groups[{!param.trainable, param.element_bytes}].push_back(param.numel);
  std::vector<FlatSize> flats;
  for (const auto& [key, numels] : groups) flats.push_back({plan_flat(numels, p.ranks, p.align_numel), key.second, !key.first});
  return flats;
}

std::vector<UnitSize> size_units(const ModelSizes& model, UnitBudget budget, const Partition& p) {
  const std::vector<int> ends = subtree_ends(model.tree);
  std::vector<UnitSize> units;
  for (const Unit& unit : plan_units(model.tree, budget)) {
    std::vector<ParamSize> params;
    for (int module : unit.modules) {
      const int end = unit.own_only ? module + 1 : ends[module];
      for (int m = module; m < end; ++m) params.insert(params.end(), model.params[m].begin(), model.params[m].end());
    }
    UnitSize size;
    size.flats = flats_of(params, p);
    size.numel = unit.numel;
    for (const ParamSize& param : params) size.trained_numel += param.trainable ? param.numel : 0;
    size.persistent = unit.numel <= p.persistent_numel;
    size.first = unit.hooked.front();
    size.last = ends[unit.hooked.back()];
    units.push_back(std::move(size));
  }
  return units;
}

// Plays a forward and a backward with the pool's rules, modules running in the order of the tree.
class GatherReplay {
 public:
  GatherReplay(const std::vector<UnitSize>& units, const Partition& p) : units_(units), partition_(p), held_(units.size()) {
    for (size_t u = 0; u < units.size(); ++u) {
      if (units[u].persistent) gather(static_cast<int>(u));
    }
  }

  int64_t run(int modules) {
    for (int at = 0; at <= modules; ++at) {
      visit([&](const UnitSize& u) { return u.last == at; }, /*enters=*/false, /*step=*/1);
      visit([&](const UnitSize& u) { return u.first == at; }, /*enters=*/true, /*step=*/1);
    }
    for (int at = modules; at >= 0; --at) {
      visit([&](const UnitSize& u) { return u.first == at; }, /*enters=*/false, /*step=*/-1);
      visit([&](const UnitSize& u) { return u.last == at; }, /*enters=*/true, /*step=*/-1);
    }
    return allocated_;
  }

 private:
  template <typename Condition>
  void visit(Condition matches, bool enters, int step) {
    const int n = static_cast<int>(units_.size());
    for (int i = 0; i < n; ++i) {
      const int u = step > 0 ? i : n - 1 - i;
      if (units_[u].persistent || !matches(units_[u])) continue;
      if (!enters) {
        free_unit(u);
        continue;
      }
      gather(u);
      if (partition_.prefetch) gather_next(u, step);
    }
  }

  void gather_next(int unit, int step) {
    const int n = static_cast<int>(units_.size());
    for (int u = unit + step; u >= 0 && u < n; u += step) {
      if (units_[u].persistent) continue;
      gather(u);
      return;
    }
  }

  void gather(int unit) {
    if (!held_[unit].empty()) return;
    for (const FlatSize& flat : units_[unit].flats) {
      const int64_t bytes = flat.full_bytes();
      const int found = best_free_buffer(free_, bytes);
      int64_t buffer = 0;
      if (found >= 0) {
        buffer = free_[found];
        free_.erase(free_.begin() + found);
      } else {
        buffer = pool_buffer_bytes(bytes, partition_.on_host);
        allocated_ += buffer;
      }
      held_[unit].push_back(buffer);
    }
  }

  void free_unit(int unit) {
    free_.insert(free_.end(), held_[unit].begin(), held_[unit].end());
    held_[unit].clear();
  }

  const std::vector<UnitSize>& units_;
  const Partition& partition_;
  std::vector<std::vector<int64_t>> held_;
  std::vector<int64_t> free_;
  int64_t allocated_ = 0;
};

// Where each flat rests, by the rules that the engine and the store follow.
void settle(std::vector<UnitSize>& units, const Partition& p) {
  std::vector<int64_t> trained;
  for (const UnitSize& unit : units) trained.push_back(unit.trained_numel);
  const std::vector<bool> rests = resting_units(trained, p.offload.states_share);
  MemoryQuota in_memory(p.offload.params_in_memory);
  for (size_t u = 0; u < units.size(); ++u) {
    for (FlatSize& flat : units[u].flats) {
      if (flat.trainable && rests[u]) flat.states = p.offload.states;
      const bool stays = p.offload.params == Tier::File && in_memory.take(flat.layout.shard_numel);
      flat.params = !stays ? p.offload.params : p.on_host ? Tier::Device : Tier::Host;
    }
  }
}

// Ranks on the host have all that is not in files where the model runs.
MemoryUse& tier_of(Estimate& result, const Partition& p, Tier tier) {
  if (tier == Tier::File) return result.file;
  return tier == Tier::Host && !p.on_host ? result.host : result.device;
}

bool has_master(const FlatSize& flat, const Partition& p) {
  // An fp32 parameter is its own master, unless it is on an accelerator and its states are not.
  return flat.element_bytes < kFloatBytes || (!p.on_host && flat.states != Tier::Device && flat.params == Tier::Device);
}

// A master is whole, or lies beside the weights.
bool is_split(const FlatSize& flat, const Partition& p) { return p.split_master && flat.element_bytes < kFloatBytes; }

int64_t master_bytes(const FlatSize& flat, const Partition& p) {
  if (!has_master(flat, p)) return 0;
  return is_split(flat, p) ? kFloatBytes - flat.element_bytes : kFloatBytes;
}

// Bytes an element that the step over states in a file streams. A parameter that is its own master is reached through its mapping.
int64_t streamed_bytes(const FlatSize& flat, const Partition& p) { return p.states * kFloatBytes + master_bytes(flat, p); }

// Memory of the step's tiles over states in files.
int64_t tile_memory(const std::vector<UnitSize>& units, const Partition& p) {
  const int64_t most = p.offload.tiles.tile_bytes / kFloatBytes;
  int64_t tiles = 0, slot = 0;
  for (const UnitSize& unit : units) {
    for (const FlatSize& flat : unit.flats) {
      if (!flat.trainable || flat.states != Tier::File) continue;
      tiles += ceil_div(flat.layout.shard_numel, most);
      const auto pages = [&](int64_t element_bytes) { return round_up(std::min(flat.layout.shard_numel, most) * element_bytes, kReservePageBytes); };
      slot = std::max(slot, p.states * pages(kFloatBytes) + pages(master_bytes(flat, p)));
    }
  }
  return std::min<int64_t>(tiles, p.offload.tiles.buffers) * slot;
}

// Rings that values pass through between an accelerator and the host.
int64_t ring_memory(const std::vector<UnitSize>& units, const Partition& p) {
  int64_t down = 0, up = 0, shards = 0;
  for (const UnitSize& unit : units) {
    for (const FlatSize& flat : unit.flats) {
      if (flat.params != Tier::Device) shards = std::max(shards, std::min(flat.shard_bytes(), kShardPieceBytes));
      if (!flat.trainable || flat.states == Tier::Device) continue;
      const int64_t slice_bytes = flat.layout.shard_numel * reduced_bytes(flat, p);
      down = std::max(down, gradient_buffers(slice_bytes) * slice_bytes);
      if (flat.params == Tier::Device) {
        const int64_t tile_bytes = flat.states == Tier::File ? p.offload.tiles.tile_bytes : kHostTileBytes;
        up = std::max(up, std::min(flat.layout.shard_numel, tile_bytes / kFloatBytes) * flat.element_bytes);
      }
    }
  }
  return down + kWeightBuffers * up + kShardBuffers * shards;
}

void by_kind(Estimate& result, const std::vector<UnitSize>& units, const Partition& p, bool sharded, int modules) {
  int64_t largest = 0;
  for (const UnitSize& unit : units) {
    for (const FlatSize& flat : unit.flats) {
      tier_of(result, p, flat.params).parameters += sharded ? flat.shard_bytes() : flat.full_bytes();
      if (!flat.trainable) continue;
      const int64_t owned = p.partial_step ? flat.layout.shard_numel : flat.layout.numel();
      MemoryUse& states = tier_of(result, p, flat.states);
      states.gradients += kFloatBytes * owned;
      states.master_weights += master_bytes(flat, p) * owned;
      states.optimizer_state += kFloatBytes * p.states * owned;
      if (p.offload.ahead && flat.states != Tier::Device) states.updates_ahead += (streamed_bytes(flat, p) + flat.element_bytes) * owned;
      largest = std::max(largest, flat.layout.numel() * reduced_bytes(flat, p));
    }
  }
  if (largest > 0) result.device.buckets = bucket_bytes(largest).total;
  if (sharded) result.device.gathered_units = GatherReplay(units, p).run(modules);
  tier_of(result, p, Tier::Host).staging = tile_memory(units, p) + (p.on_host ? 0 : ring_memory(units, p));
}

TierTraffic tier_traffic(const std::vector<UnitSize>& units, const Partition& p) {
  TierTraffic t;
  for (const UnitSize& unit : units) {
    for (const FlatSize& flat : unit.flats) {
      const int64_t slice = flat.layout.shard_numel * kFloatBytes;
      if (flat.params != Tier::Device && (flat.params == Tier::File || !p.on_host)) {
        const int64_t gathers = unit.persistent ? (flat.trainable ? 1 : 0) : 2 * p.accumulation;
        if (!p.on_host) t.from_host += gathers * flat.shard_bytes();
        if (flat.params == Tier::File) t.mapped_read += gathers * flat.shard_bytes();
      }
      if (!flat.trainable) continue;
      if (flat.params == Tier::File) t.mapped_written += flat.shard_bytes();
      if (flat.params == Tier::File && (!has_master(flat, p) || is_split(flat, p))) t.mapped_read += flat.shard_bytes();
      if (flat.states == Tier::Device) continue;
      if (!p.on_host) {
        t.to_host += p.accumulation * flat.layout.shard_numel * reduced_bytes(flat, p);
        if (flat.params == Tier::Device) t.from_host += flat.shard_bytes();
        if (flat.params == Tier::Device && is_split(flat, p)) t.to_host += flat.shard_bytes();
      }
      if (flat.states != Tier::File) continue;
      t.file_read += streamed_bytes(flat, p) * flat.layout.shard_numel;
      t.file_written += streamed_bytes(flat, p) * flat.layout.shard_numel;
      t.mapped_written += p.accumulation * slice;   // each micro-batch adds to the gradient slice,
      t.mapped_read += p.accumulation * slice;      // the first without reading it; the step reads it
    }
  }
  return t;
}

class TrafficSum {
 public:
  explicit TrafficSum(const Partition& p) : partition_(p) {}

  void add(const std::string& phase, int64_t bytes, int64_t times) {
    if (partition_.ranks == 1) return;
    add(phase, bytes * times, times, bytes / partition_.ranks * (partition_.ranks - 1) * times);
  }
  void add(const std::string& phase, int64_t bytes, int64_t number, int64_t sent) {
    auto it = std::find_if(rows_.begin(), rows_.end(), [&](const Traffic& t) { return t.phase == phase; });
    if (it == rows_.end()) it = rows_.insert(rows_.end(), Traffic{phase});
    it->number += number;
    it->bytes += bytes;
    it->sent_bytes += sent;
  }
  std::vector<Traffic> rows() { return std::move(rows_); }

 private:
  const Partition& partition_;
  std::vector<Traffic> rows_;
};

std::vector<Traffic> traffic_of(const std::vector<UnitSize>& units, const Partition& p, bool sharded) {
  TrafficSum sum(p);
  for (const UnitSize& unit : units) {
    for (const FlatSize& flat : unit.flats) {
      if (sharded && !unit.persistent) {
        sum.add("gather_forward", flat.full_bytes(), p.accumulation);
        sum.add("gather_backward", flat.full_bytes(), p.accumulation);
      }
      if (!flat.trainable) continue;
      sum.add("reduce", flat.layout.numel() * reduced_bytes(flat, p), p.accumulation);
      if (!p.partial_step) sum.add("gather_grads", flat.layout.numel() * kFloatBytes, 1);
      if (p.partial_step && (!sharded || unit.persistent)) sum.add("gather_updated", flat.full_bytes(), 1);
      const int64_t slice = flat.layout.shard_numel * kFloatBytes;
      if (p.replicas > 1) sum.add("reduce_replicas", slice * p.replicas, 1, slice * (p.replicas - 1));
    }
  }
  return sum.rows();
}

// The host is the device of ranks on the host; states follow the parameters from an accelerator.
Partition with_what_follows(Partition p) {
  for (Tier* tier : {&p.offload.states, &p.offload.params}) {
    if (p.on_host && *tier == Tier::Host) *tier = Tier::Device;
  }
  if (!p.on_host && p.offload.params != Tier::Device) {
    if (p.offload.states == Tier::Device) p.offload.states = Tier::Host;
    p.offload.states_share = 1;
  }
  return p;
}

void check(const ModelSizes& model, const Partition& p) {
  DS_CHECK_VALUE(p.ranks >= 1 && p.replicas >= 1, "estimate: " << p.ranks << " ranks, " << p.replicas << " replicas; at least 1 of each");
  DS_CHECK_VALUE(p.accumulation >= 1, "estimate: " << p.accumulation << " micro-batches a step; at least 1");
  DS_CHECK_VALUE(p.partial_step || !p.shard_params, "estimate: parameters are divided only together with the step");
  DS_CHECK_VALUE(p.partial_step || p.offload.states == Tier::Device, "estimate: states rest elsewhere only where the step is divided");
  DS_CHECK_VALUE(p.shard_params || p.offload.params == Tier::Device, "estimate: parameters rest elsewhere only where they are divided");
  DS_CHECK_VALUE(p.offload.states_share >= 0 && p.offload.states_share <= 1, "estimate: a share of " << p.offload.states_share);
  const StepTiles& tiles = p.offload.tiles;
  DS_CHECK_VALUE(tiles.tile_bytes >= kReservePageBytes && tiles.tile_bytes % kReservePageBytes == 0 && tiles.buffers >= kFewestTiles,
                 "estimate: " << tiles.buffers << " tiles of " << tiles.tile_bytes << " bytes; at least " << kFewestTiles << ", of a multiple of "
                              << kReservePageBytes);
  DS_CHECK_VALUE(model.tree.size() == model.params.size(),
                 "estimate: " << model.tree.size() << " modules, but parameters for " << model.params.size());
  for (size_t m = 0; m < model.tree.size(); ++m) {
    int64_t numel = 0;
    for (const ParamSize& param : model.params[m]) {
      DS_CHECK_VALUE(param.numel >= 0 && param.element_bytes >= 1, "estimate: a parameter of " << param.numel << " elements");
      numel = checked_add(numel, param.numel);
    }
    DS_CHECK_VALUE(numel == model.tree[m].own_numel, "estimate: module " << m << " owns " << model.tree[m].own_numel
                                                                         << " elements, but its parameters have " << numel);
  }
}

}  // namespace

Estimate estimate(const ModelSizes& model, UnitBudget budget, const Partition& requested) {
  check(model, requested);
  const Partition partition = with_what_follows(requested);
  // One rank owns everything anyway: nothing to free, nothing to gather, unless the shards rest elsewhere.
  const bool sharded = partition.shard_params && (partition.ranks > 1 || partition.offload.params != Tier::Device);
  std::vector<UnitSize> units = size_units(model, budget, partition);
  settle(units, partition);
  Estimate result;
  by_kind(result, units, partition, sharded, static_cast<int>(model.tree.size()));
  result.tiers = tier_traffic(units, partition);
  result.traffic = traffic_of(units, partition, sharded);
  result.units = static_cast<int64_t>(units.size());
  for (const UnitSize& unit : units) {
    result.numel = checked_add(result.numel, unit.numel);
    result.largest_unit_numel = std::max(result.largest_unit_numel, unit.numel);
  }
  return result;
}

}  // namespace ds::plan
