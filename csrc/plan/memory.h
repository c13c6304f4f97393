// SPDX-License-Identifier: Apache-2.0
// How many bytes a rank holds for a model, by kind and tier, and how many it sends and moves in a step. Integers only: the same units, flats,
// shards, buckets and buffers that the engine makes, for a model that need not exist.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "plan/reserve.h"
#include "plan/units.h"

namespace ds::plan {

struct ParamSize {
  int64_t numel = 0;
  int64_t element_bytes = 4;   // as it is trained: 2 under bf16 and fp16
  bool trainable = true;
};

// A model: its module tree in pre-order, and for each module the parameters it owns.
struct ModelSizes {
  std::vector<Module> tree;
  std::vector<std::vector<ParamSize>> params;
};

// Where bytes rest while nobody uses them: where the model runs, in the host's memory, in a file.
enum class Tier { Device, Host, File };

struct Offload {
  Tier states = Tier::Device;      // gradient slices, master weights and optimizer state
  Tier params = Tier::Device;      // the parameters' shards
  double states_share = 1;         // of the trained elements, whose states rest there
  bool ahead = false;              // updates beside backward: what they make of states, masters and weights has a place of its own
  int64_t params_in_memory = 0;    // for shards in files: elements of a rank's that stay in the host's memory
  StepTiles tiles = step_tiles(4, int64_t{1} << 20);   // of the step over states in files
};

struct Partition {
  int ranks = 1;                   // that a flat is cut over
  int replicas = 1;                // groups of such ranks (hybrid sharding)
  bool shard_params = false;       // parameters exist in slices between uses
  bool partial_step = false;       // each rank updates its own slices only
  int64_t persistent_numel = 0;    // units up to this size stay gathered
  int64_t reduce_bytes = 0;        // element size of gradients on their way; 0: the parameter's
  int64_t states = 2;              // fp32 values of optimizer state an element
  bool split_master = false;       // the master of a 16-bit parameter is two bytes beside it, not an fp32 value
  int64_t accumulation = 1;        // micro-batches a step
  int64_t align_numel = 64;
  bool on_host = false;            // the device is the host itself: buffers are rounded to its pages
  bool prefetch = true;            // the next unit is gathered while one computes; shared memory pulls and does not
  Offload offload;                 // with on_host Tier::Host is where things are anyway
};

// Bytes by kind.
struct MemoryUse {
  int64_t parameters = 0;
  int64_t gradients = 0;        // fp32 accumulators
  int64_t master_weights = 0;
  int64_t optimizer_state = 0;
  int64_t updates_ahead = 0;    // what updates beside backward make of weights, masters and states
  int64_t gathered_units = 0;   // buffers for units in use, and units that stay gathered
  int64_t buckets = 0;          // gradients on their way
  int64_t staging = 0;          // what passes between tiers: tiles of the step, rings of transfers
  int64_t total() const {
    return parameters + gradients + master_weights + optimizer_state + updates_ahead + gathered_units + buckets + staging;
  }
};

// Bytes of one rank between tiers in a step.
struct TierTraffic {
  int64_t to_host = 0, from_host = 0;          // between an accelerator and the host's memory
  int64_t file_read = 0, file_written = 0;     // past the page cache, in every step
  int64_t mapped_read = 0, mapped_written = 0; // through it: they reach the disk as far as memory has no room for them
};

// All collectives of one phase in one step. `bytes` counts whole flats; a ring sends (ranks - 1) / ranks of them.
struct Traffic {
  std::string phase;
  int64_t number = 0;
  int64_t bytes = 0;
  int64_t sent_bytes = 0;       // by each rank
};

struct Estimate {
  MemoryUse device, host, file;
  TierTraffic tiers;
  std::vector<Traffic> traffic;
  int64_t numel = 0;
  int64_t units = 0;
  int64_t largest_unit_numel = 0;
};

Estimate estimate(const ModelSizes& model, UnitBudget budget, const Partition& partition);

}  // namespace ds::plan
