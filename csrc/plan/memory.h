// SPDX-License-Identifier: Apache-2.0
// How many bytes a rank holds for a model, by kind, and how many it sends in a step. Integers only: the same units, flats,
// shards, buckets and buffers that the engine makes, for a model that need not exist.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

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

struct Partition {
  int ranks = 1;                   // that a flat is cut over
  int replicas = 1;                // groups of such ranks (hybrid sharding)
  bool shard_params = false;       // parameters exist in slices between uses
  bool partial_step = false;       // each rank updates its own slices only
  int64_t persistent_numel = 0;    // units up to this size stay gathered
  int64_t reduce_bytes = 0;        // element size of gradients on their way; 0: the parameter's
  int64_t states = 2;              // fp32 values of optimizer state an element
  int64_t accumulation = 1;        // micro-batches a step
  int64_t align_numel = 64;
  bool on_host = false;            // the device is the host itself: buffers are rounded to its pages
  bool prefetch = true;            // the next unit is gathered while one computes; shared memory pulls and does not
  bool offload_states = false;     // gradients, master weights and optimizer state rest on the host
  bool offload_params = false;     // so do the parameters' shards
};

// Bytes by kind.
struct MemoryUse {
  int64_t parameters = 0;
  int64_t gradients = 0;        // fp32 accumulators
  int64_t master_weights = 0;
  int64_t optimizer_state = 0;
  int64_t gathered_units = 0;   // buffers for units in use, and units that stay gathered
  int64_t buckets = 0;          // gradients on their way
  int64_t total() const { return parameters + gradients + master_weights + optimizer_state + gathered_units + buckets; }
};

// All collectives of one phase in one step. `bytes` counts whole flats; a ring sends (ranks - 1) / ranks of them.
struct Traffic {
  std::string phase;
  int64_t number = 0;
  int64_t bytes = 0;
  int64_t sent_bytes = 0;       // by each rank
};

struct Estimate {
  MemoryUse device, host;
  std::vector<Traffic> traffic;
  int64_t numel = 0;
  int64_t units = 0;
  int64_t largest_unit_numel = 0;
};

Estimate estimate(const ModelSizes& model, UnitBudget budget, const Partition& partition);

}  // namespace ds::plan
