// SPDX-License-Identifier: Apache-2.0
#include "config/rules.h"

#include "config/values.h"

namespace ds::config {

namespace {

bool on(const Json& section, const char* name) { return section[name].is_boolean() && section[name].get<bool>(); }

bool given(const Resolved& resolved, const char* path) { return resolved.given.count(path) != 0; }

// A part that has no effect at this stage goes back to its defaults, so that nobody downstream has to ask for the stage.
void drop_offload_without_effect(Resolved& resolved, int64_t stage, Findings& findings) {
  Json& zero = resolved.values["zero_optimization"];
  const auto drop = [&](const char* name, int64_t from_stage) {
    if (stage >= from_stage || zero[name]["device"] == "none") return;
    findings.note(std::string("zero_optimization.") + name + " has no effect at stage " + std::to_string(stage));
    zero[name] = default_value(*training_schema().find("zero_optimization")->find(name));
  };
  drop("offload_param", 3);
  drop("offload_optimizer", 1);
}

void zero_rules(Resolved& resolved, Findings& findings) {
  Json& zero = resolved.values["zero_optimization"];
  const int64_t stage = zero["stage"];
  const std::string at_stage = "; zero_optimization.stage is " + std::to_string(stage);
  if (zero["offload_optimizer"]["ratio"].get<double>() < 1.0 && stage < 3) {
    findings.problem("zero_optimization.offload_optimizer.ratio",
                     "found " + show(zero["offload_optimizer"]["ratio"]) + "; below 1 is allowed at stage 3 only" + at_stage);
  }
  drop_offload_without_effect(resolved, stage, findings);
  for (const char* name : {"offload_optimizer", "offload_param"}) {
    if (zero[name]["device"] == "nvme" && zero[name]["nvme_path"].is_null()) {
      findings.problem(std::string("zero_optimization.") + name + ".nvme_path", "missing; device \"nvme\" needs the folder in which it rests");
    }
  }
  if (zero["reduce_bucket_size"] == 0) {
    zero["reduce_bucket_size"] = training_schema().find("zero_optimization")->find("reduce_bucket_size")->fallback;
  }
  if (zero["overlap_comm"].is_null()) zero["overlap_comm"] = stage == 3;
  if (!on(zero, "compute_grad_norm")) {
    if (stage == 0 || stage == 3) {
      findings.problem("zero_optimization.compute_grad_norm", "found false; allowed at stages 1 and 2 only" + at_stage);
    } else if (resolved.values["gradient_clipping"].get<double>() > 0) {
      findings.problem("zero_optimization.compute_grad_norm", "found false, but gradient_clipping is " +
                                                                  show(resolved.values["gradient_clipping"]) +
                                                                  (given(resolved, "gradient_clipping") ? "" : " (the default)") +
                                                                  " and needs the norm; set gradient_clipping to 0");
    }
  }
  if (resolved.values["gradient_allreduce_op"] == "sum" && stage == 3) {
    findings.problem("gradient_allreduce_op", "found \"sum\"; at zero_optimization.stage 3 only \"mean\" is allowed");
  }
}

void precision_rules(Resolved& resolved, Findings& findings) {
  Json& fp16 = resolved.values["fp16"];
  Json& bf16 = resolved.values["bf16"];
  const int64_t stage = resolved.values["zero_optimization"]["stage"];
  if (on(fp16, "enabled") && on(bf16, "enabled")) {
    findings.problem("fp16.enabled, bf16.enabled", "both are true; at most one may be");
  }
  if (on(fp16, "enabled") && fp16["loss_scale"] == 0.0) {
    for (const char* name : {"loss_scale_window", "min_loss_scale"}) {
      if (fp16[name].get<int64_t>() <= 0) {
        findings.problem(std::string("fp16.") + name,
                         "found " + show(fp16[name]) + "; allowed: an integer above 0, because loss_scale is 0 (dynamic)");
      }
    }
  }
  const auto masters = [&](const Json& section, const char* path, const char* name) {
    if (on(section, name) && stage == 0) {
      findings.problem(std::string(path) + "." + name, "found true; needs zero_optimization.stage 1, 2 or 3, found 0");
    }
  };
  masters(fp16, "fp16", "fp16_master_weights_and_grads");
  masters(bf16, "bf16", "bf16_master_weights_and_grads");
  if (on(fp16, "fp16_master_weights_and_grads") && on(bf16, "bf16_master_weights_and_grads")) {
    findings.problem("fp16.fp16_master_weights_and_grads, bf16.bf16_master_weights_and_grads", "both are true; at most one may be");
  }
  if (on(bf16, "split_master") && !on(bf16, "enabled")) {
    findings.problem("bf16.split_master", "found true; needs bf16.enabled true, found false: only a bf16 weight is the upper half of an fp32 master");
  }
  if (on(bf16, "bf16_optimizer_states") && !on(bf16, "bf16_master_weights_and_grads")) {
    findings.problem("bf16.bf16_optimizer_states", "found true; needs bf16.bf16_master_weights_and_grads true, found false");
  }
  Json& autocast = resolved.values["torch_autocast"];
  if (on(autocast, "enabled") && autocast["dtype"].is_null()) autocast["dtype"] = "bf16";
  const Json& param_dtype = resolved.values["data_types"]["param_dtype"];
  const std::string mode = on(fp16, "enabled") ? "fp16" : on(bf16, "enabled") ? "bf16" : "fp32";
  if (param_dtype.is_string() && param_dtype != mode) {
    findings.problem("data_types.param_dtype", "found " + show(param_dtype) + ", but fp16.enabled and bf16.enabled say " + in_quotes(mode));
  }
}

void activation_rules(const Resolved& resolved, Findings& findings) {
  const Json& section = resolved.values["activation_checkpointing"];
  if (!on(section, "contiguous_memory_optimization")) return;
  if (!on(section, "partition_activations") || section["number_checkpoints"].is_null()) {
    findings.note("activation_checkpointing.contiguous_memory_optimization needs partition_activations true and number_checkpoints "
                  "when deepspeed.checkpointing.configure() is called");
  }
}

bool require(const Json& section, const std::string& path, const std::vector<const char*>& names, const char* why, Findings& findings) {
  bool all = true;
  for (const char* name : names) {
    if (!section[name].is_null()) continue;
    findings.problem(join(path, name), std::string("missing; ") + why);
    all = false;
  }
  return all;
}

// The difficulties of one measure, and how they grow.
void schedule_rules(const Json& measure, const std::string& path, Findings& findings) {
  if (!require(measure, path, {"min_difficulty", "max_difficulty", "schedule_type"}, "every measure requires it", findings)) return;
  if (measure["min_difficulty"].get<double>() > measure["max_difficulty"].get<double>()) {
    findings.problem(path + ".min_difficulty",
                     "found " + show(measure["min_difficulty"]) + ", above max_difficulty, " + show(measure["max_difficulty"]));
  }
  const Json& schedule = measure["schedule_config"];
  const std::string type = measure["schedule_type"];
  const std::string here = path + ".schedule_config";
  const std::string why = "schedule_type " + in_quotes(type) + " requires it";
  if (type == "fixed_linear") require(schedule, here, {"total_curriculum_step", "difficulty_step"}, why.c_str(), findings);
  if (type == "fixed_root") require(schedule, here, {"total_curriculum_step", "difficulty_step", "root_degree"}, why.c_str(), findings);
  if (type != "fixed_discrete" || !require(schedule, here, {"difficulty", "max_step"}, why.c_str(), findings)) return;
  if (schedule["difficulty"].size() != schedule["max_step"].size() + 1) {
    findings.problem(here + ".difficulty", "has " + std::to_string(schedule["difficulty"].size()) +
                                               " items; allowed: one more than max_step, which has " +
                                               std::to_string(schedule["max_step"].size()));
  }
}

void curriculum_rules(const Resolved& resolved, Findings& findings) {
  const Json& old_form = resolved.values["curriculum_learning"];
  if (on(old_form, "enabled")) schedule_rules(old_form, "curriculum_learning", findings);
  const std::string path = "data_efficiency.data_sampling.curriculum_learning";
  const Json& section = resolved.values["data_efficiency"]["data_sampling"]["curriculum_learning"];
  if (!on(section, "enabled")) return;
  const Json& metrics = section["curriculum_metrics"];
  if (metrics.empty()) findings.problem(path + ".curriculum_metrics", "missing; required when curriculum_learning.enabled is true");
  for (const auto& [name, metric] : metrics.items()) {
    const std::string here = join(path + ".curriculum_metrics", name);
    schedule_rules(metric, here, findings);
    if (metric["clustering_type"] == "single_cluster") continue;
    require(metric, here, {"index_to_sample_path", "index_to_metric_path", "difficulty_type"},
            "required unless clustering_type is \"single_cluster\"", findings);
  }
}

void token_dropping_rules(const Resolved& resolved, Findings& findings) {
  const std::string path = "data_efficiency.data_routing.random_ltd";
  const Json& ltd = resolved.values["data_efficiency"]["data_routing"]["random_ltd"];
  if (!on(ltd, "enabled")) return;
  const char* const why = "required when random_ltd.enabled is true";
  require(ltd["random_ltd_schedule"], path + ".random_ltd_schedule", {"min_value", "max_value", "schedule_type"}, why, findings);
  require(ltd["random_ltd_schedule"]["schedule_config"], path + ".random_ltd_schedule.schedule_config", {"require_steps", "seq_per_step"},
          why, findings);
  if (!require(ltd, path, {"total_layer_num", "random_ltd_layer_num", "random_ltd_layer_id", "model_type"}, why, findings)) return;
  const Json& ids = ltd["random_ltd_layer_id"];
  const int64_t total = ltd["total_layer_num"];
  if (ids.size() != ltd["random_ltd_layer_num"].get<size_t>()) {
    findings.problem(path + ".random_ltd_layer_id",
                     "has " + std::to_string(ids.size()) + " items, but random_ltd_layer_num is " + show(ltd["random_ltd_layer_num"]));
  }
  for (const Json& id : ids) {
    if (id.get<int64_t>() < 0 || id.get<int64_t>() >= total) {
      findings.problem(path + ".random_ltd_layer_id",
                       "found " + show(id) + "; allowed: 0 to total_layer_num - 1 = " + std::to_string(total - 1));
    }
  }
}

void data_rules(const Resolved& resolved, Findings& findings) {
  curriculum_rules(resolved, findings);
  token_dropping_rules(resolved, findings);
  const Json& batching = resolved.values["data_efficiency"]["data_sampling"]["dynamic_batching"];
  if (on(batching, "enabled") && batching["max_tokens"].is_null()) {
    findings.problem("data_efficiency.data_sampling.dynamic_batching.max_tokens",
                     "missing; required when dynamic_batching.enabled is true");
  }
}

// ---- values that cannot be honoured ----------------------------------------------------------------------------------

bool enabled_inside(const Json& value) {
  if (!value.is_structured()) return false;
  if (value.is_object() && value.contains("enabled") && as_bool(value["enabled"]).value_or(false)) return true;
  for (const Json& item : value) {
    if (enabled_inside(item)) return true;
  }
  return false;
}

bool above_one(const Json& value) { return value.is_number() && value.get<double>() > 1; }

bool is_empty(const Json& value) {
  return value.is_null() || value == false || (value.is_structured() && value.empty()) ||
         (value.is_object() && value.contains("enabled") && as_bool(value["enabled"]) == std::optional<bool>(false));
}

class Refuser {
 public:
  Refuser(const Resolved& resolved, Device device, Findings& findings) : given_(resolved.given), device_(device), findings_(findings) {}

  void walk(const Key& section, const Json& values, const std::string& path) {
    for (const Key& child : section.children) {
      if (!values.contains(child.name)) continue;
      const Json& value = values[child.name];
      const std::string here = join(path, child.name);
      for (const Refusal& refusal : child.refusals) check(child, refusal, value, here);
      if (child.type == Type::Object) walk(child, value, here);
      if (child.type == Type::Map) {
        for (const auto& [name, item] : value.items()) walk(child, item, join(here, name));
      }
    }
  }

 private:
  bool applies(const Key& key, const Refusal& refusal, const Json& value, const std::string& here) const {
    if (refusal.device != Device::Any && refusal.device != device_) return false;
    switch (refusal.when) {
      case When::True: return value == true;
      case When::False: return value == false;
      case When::Equals: return value == refusal.equals;
      case When::AboveOne: return above_one(value);
      case When::Enabled: return enabled_inside(value);
      case When::Given: return key.type == Type::Object ? given_.count(here) != 0 : !is_empty(value);
    }
    return false;
  }

  void check(const Key& key, const Refusal& refusal, const Json& value, const std::string& here) {
    if (!applies(key, refusal, value, here)) return;
    const std::string found = key.type == Type::Object ? "is switched on" : "found " + show(value);
    const std::string where = refusal.device == Device::Any ? "" : " on a GPU";
    findings_.problem(here, found + ", which cannot be honoured" + where + "; " + refusal.advice);
  }

  const std::set<std::string>& given_;
  const Device device_;
  Findings& findings_;
};

}  // namespace

void apply_rules(Resolved& resolved, Findings& findings) {
  zero_rules(resolved, findings);
  precision_rules(resolved, findings);
  activation_rules(resolved, findings);
  data_rules(resolved, findings);
}

void refuse_unbuilt(const Resolved& resolved, Device device, Findings& findings) {
  Refuser(resolved, device, findings).walk(training_schema(), resolved.values, "");
}

}  // namespace ds::config
