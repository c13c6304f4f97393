// SPDX-License-Identifier: Apache-2.0
#include "config/config.h"

#include "config/resolve.h"
#include "config/rules.h"
#include "config/values.h"

namespace ds::config {

namespace {

std::optional<int64_t> optional_integer(const Json& value) {
  if (value.is_null()) return std::nullopt;
  return value.get<int64_t>();
}

// Who shares samples: an mpu or a mesh that the caller passed, else the document.
World resolve_world(const Resolved& resolved, const Options& options, Findings& findings) {
  World world = options.world;
  const std::optional<int64_t> sequence = optional_integer(resolved.values["sequence_parallel_size"]);
  const std::optional<int64_t> data = optional_integer(resolved.values["data_parallel_size"]);
  if (!world.ranks_per_sample_source.empty()) return world;
  if (sequence) {
    world.ranks_per_sample = *sequence;
    world.ranks_per_sample_source = "sequence_parallel_size";
  }
  if (data && sequence && *data != world.size / *sequence) {
    findings.problem("data_parallel_size", "found " + std::to_string(*data) + "; times sequence_parallel_size (" +
                                               std::to_string(*sequence) + ") it must be the world size, " + std::to_string(world.size) +
                                               " (" + world.size_source + ")");
  } else if (data && !sequence) {
    findings.note("data_parallel_size has no effect without sequence_parallel_size");
  }
  return world;
}

Batch resolve_batch(Resolved& resolved, const Options& options, Findings& findings) {
  Json& values = resolved.values;
  Batch batch;
  batch.train = optional_integer(values["train_batch_size"]);
  batch.micro = optional_integer(values["train_micro_batch_size_per_gpu"]);
  batch.accumulation = optional_integer(values["gradient_accumulation_steps"]);
  const World world = resolve_world(resolved, options, findings);
  if (!findings.clean()) return batch;  // the equation of wrong numbers is no news
  solve_batch(batch, world, options.batch_required, findings);
  const auto as_json = [](const std::optional<int64_t>& value) { return value ? Json(*value) : Json(nullptr); };
  values["train_batch_size"] = as_json(batch.train);
  values["train_micro_batch_size_per_gpu"] = as_json(batch.micro);
  values["gradient_accumulation_steps"] = as_json(batch.accumulation);
  return batch;
}

void read_typed(Config& config) {
  const Json& zero = config.values["zero_optimization"];
  config.zero = {zero["stage"], zero["reduce_bucket_size"], zero["allgather_bucket_size"], zero["prefetch_bucket_size"],
                 zero["param_persistence_threshold"], zero["model_persistence_threshold"], zero["max_live_parameters"],
                 zero["max_reuse_distance"], zero["sub_group_size"], zero["zero_hpz_partition_size"],
                 zero["overlap_comm"], zero["compute_grad_norm"], zero["ignore_unused_parameters"]};
  const Json& fp16 = config.values["fp16"];
  config.fp16 = {fp16["enabled"], fp16["auto_cast"], fp16["consecutive_hysteresis"], fp16["loss_scale"],
                 fp16["initial_scale_power"], fp16["loss_scale_window"], fp16["hysteresis"], fp16["min_loss_scale"]};
  const Json& bf16 = config.values["bf16"];
  config.bf16 = {bf16["enabled"], bf16["check_grad_overflow"]};
  config.gradient_clipping = config.values["gradient_clipping"];
  const Json& dtype = config.values["communication_data_type"];
  if (dtype.is_string()) config.communication.dtype = dtype.get<std::string>();
  config.communication.average = config.values["gradient_allreduce_op"] == "mean";
}

bool wants_strict(const Json& document, const Options& options) {
  if (options.strict) return *options.strict;
  return document.contains("strict") && as_bool(document["strict"]).value_or(false);
}

}  // namespace

Config load(const Json& document, const Options& options) {
  DS_CHECK_VALUE(options.world.size > 0, "world size must be positive, got " << options.world.size);
  Findings findings;
  if (!document.is_object())
    throw ConfigError(options.source + ": found " + show_typed(document) + "; the document must be an object {...}");
  Resolved resolved = resolve(training_schema(), document, wants_strict(document, options), findings);
  resolve_params(resolved, document, findings);
  apply_rules(resolved, findings);
  Config config;
  config.batch = resolve_batch(resolved, options, findings);
  if (!options.accept_unbuilt) refuse_unbuilt(resolved, options.device, findings);
  findings.throw_if_any(options.source);
  config.values = std::move(resolved.values);
  config.given = std::move(resolved.given);
  config.remarks = findings.remarks();
  read_typed(config);
  return config;
}

std::string canonical_path(const std::string& path) {
  const Key* key = &training_schema();
  std::string result;
  size_t begin = 0;
  while (begin <= path.size()) {
    const size_t end = std::min(path.find('.', begin), path.size());
    const std::string name = path.substr(begin, end - begin);
    if (key->type != Type::Object) {
      // Below free-form objects and lists the names are the user's.
      const bool open = key->type == Type::Free || key->type == Type::Map || key->type == Type::Any;
      return open ? result + "." + path.substr(begin) : "";
    }
    key = key->find(name);
    if (key == nullptr) return "";
    result = join(result, key->name);
    begin = end + 1;
  }
  return result;
}

bool Config::is_set(const std::string& path) const {
  const std::string canonical = canonical_path(path);
  DS_CHECK_VALUE(!canonical.empty(), "no such key: " << path);
  return given.count(canonical) != 0;
}

}  // namespace ds::config
