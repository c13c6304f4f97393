// SPDX-License-Identifier: Apache-2.0
// The one reader of configuration. A document goes in, an immutable Config comes out; whatever is wrong is said in one ConfigError.
//
//   Options options;
//   options.world.size = 2;
//   const Config config = load(parse_relaxed(text, "ds_config.json"), options);
//   config.zero.stage; config.values["zero_optimization"]["stage"]; config.is_set("zero_optimization.stage");
#pragma once

#include <cstdint>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "config/batch.h"
#include "config/error.h"
#include "config/schema.h"

namespace ds::config {

struct Options {
  World world;  // without ranks_per_sample_source, sequence_parallel_size of the document says who shares samples
  Device device = Device::Cpu;
  std::optional<bool> strict;  // over the document's own "strict"
  bool batch_required = true;  // false: for readers that only ask where parameters go
  bool accept_unbuilt = false; // true: for readers that run nothing, so what is not built yet may be asked for
  std::string source = "config";  // named in messages
};

// The sections that C++ reads, typed. The same values stand in Config::values.
struct Zero {
  int64_t stage, reduce_bucket_numel, allgather_bucket_numel, prefetch_numel, persistence_threshold_numel;
  int64_t model_persistence_numel, max_live_numel, max_reuse_distance_numel, sub_group_numel, secondary_partition_ranks;
  bool overlap_comm, compute_grad_norm, ignore_unused_parameters;
};
struct Fp16 {
  bool enabled, auto_cast, consecutive_hysteresis;
  double loss_scale;  // 0: dynamic
  int64_t initial_scale_power, loss_scale_window, hysteresis, min_loss_scale;
};
struct Bf16 {
  bool enabled, check_grad_overflow;
};
struct Communication {
  std::optional<std::string> dtype;  // fp32, fp16 or bf16
  bool average;                      // false: gradients are added
};

struct Config {
  Json values;  // every key of the schema, resolved
  std::set<std::string> given;
  std::vector<Remark> remarks;
  Batch batch;
  Zero zero;
  Fp16 fp16;
  Bf16 bf16;
  Communication communication;
  double gradient_clipping;  // 0: off

  // Whether the user wrote this key (under any of its spellings) with a value other than null and "auto".
  // Throws for a path that no row of the schema describes.
  bool is_set(const std::string& path) const;
};

Config load(const Json& document, const Options& options);

// The path under its canonical spelling: "bfloat16.enabled" -> "bf16.enabled". Empty if it is unknown.
std::string canonical_path(const std::string& path);

}  // namespace ds::config
