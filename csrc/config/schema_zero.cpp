// SPDX-License-Identifier: Apache-2.0
// zero_optimization: what is partitioned, how it moves, where it rests.
#include "config/schema.h"

namespace ds::config {

namespace {

// A key that may be written with or without "stage3_".
Key both_spellings(Key key) {
  return key.alias("stage3_" + key.name).on_stages("3");
}

Key device_row() {
  return choice("device", "none", {"none", "cpu", "nvme"}, "Where it rests between uses; cpu is free when training on the CPU");
}

std::vector<Key> partition_rows() {
  return {
      integer("stage", 0, "0: nothing is partitioned; 1: optimizer states; 2: and gradients; 3: and parameters")
          .at_least(0).at_most(3).or_bool(),
      boolean("contiguous_gradients", true, "Gradients always go to contiguous buckets").on_stages("1-3").accepted(),
      boolean("reduce_scatter", true, "The primitive is chosen by measurement for each backend").on_stages("1-3").accepted(),
      integer("reduce_bucket_size", 500000000, "Elements in one gradient reduction; 0: the default").at_least(0)
          .on_stages("1-3"),
      boolean("use_multi_rank_bucket_allreduce", true, "Buckets always serve all ranks").on_stages("1-2").accepted(),
      boolean("allgather_partitions", true, "Updated parameters are always gathered").on_stages("1-2").accepted(),
      integer("allgather_bucket_size", 500000000, "Updated parameters are gathered unit by unit").at_least(0).on_stages("1-2")
          .accepted(),
      boolean("overlap_comm", nullptr, "Reductions always go on during backward").on_stages("1-3").accepted(),
      boolean("compute_grad_norm", true, "Report the global norm; false needs gradient_clipping 0 and stage 1 or 2")
          .on_stages("1-2"),
      boolean("load_from_fp32_weights", true, "Start master weights from saved fp32 values").on_stages("1-3").accepted(),
      boolean("elastic_checkpoint", false, "Every checkpoint can be loaded by any number of ranks").on_stages("1-2").accepted(),
      boolean("ignore_unused_parameters", true, "false: a parameter without a gradient is an error").on_stages("1-2"),
      boolean("legacy_stage1", false, "The stage 1 of 2020")
          .refuse(When::True, "remove it: there is one implementation of stage 1").on_stages("1"),
      boolean("round_robin_gradients", false, "Work is spread over ranks by layout").on_stages("1-2").accepted(),
      boolean("parameter_alignment", false, "Slices are always aligned").on_stages("1-2").accepted(),
      boolean("log_trace_cache_warnings", false, "There is no trace: the schedule is static").on_stages("3").accepted(),
      boolean("enable_sanity_checks", false, "Checks are always on").on_stages("3").accepted(),
      boolean("save_muon_momentum_buffer_in_memory", false, "Muon with files").on_stages("3").accepted(),
  };
}

std::vector<Key> parameter_rows() {
  return {
      integer("sub_group_size", 1000000000, "Elements the optimizer takes at once; 0: one parameter at a time").at_least(0)
          .on_stages("3").accepted(),
      both_spellings(integer("prefetch_bucket_size", 50000000, "Elements gathered ahead of use").at_least(0)),
      both_spellings(integer("param_persistence_threshold", 100000, "Parameters smaller than this stay gathered").at_least(0)),
      both_spellings(integer("model_persistence_threshold", std::numeric_limits<int64_t>::max(),
                             "Most elements that stay gathered").at_least(0)),
      both_spellings(integer("max_live_parameters", 1000000000, "Units are freed right after their use").at_least(0)).accepted(),
      both_spellings(integer("max_reuse_distance", 1000000000, "Units are freed right after their use").at_least(0)).accepted(),
      both_spellings(boolean("gather_16bit_weights_on_model_save", false, "Whether save_16bit_model gathers and writes")),
      boolean("stage3_gather_fp16_weights_on_model_save", nullptr, "Old name").on_stages("3")
          .renamed("gather_16bit_weights_on_model_save"),
      both_spellings(integer("module_granularity_threshold", 0, "Modules finer than this are gathered as one").at_least(0))
          .accepted(),
      both_spellings(boolean("use_all_reduce_for_fetch_params", false, "The primitive is chosen for each backend")).accepted(),
      both_spellings(boolean("allgather_sequential", false, "Gather parameters one at a time")).accepted(),
      boolean("memory_efficient_linear", true, "Linear layers keep no copy of a gathered weight").on_stages("3").accepted(),
      boolean("override_module_apply", true, "Module.apply always sees whole parameters under zero.Init").on_stages("3").accepted(),
      boolean("pipeline_loading_checkpoint", false, "Load rank by rank").on_stages("3").accepted(),
  };
}

std::vector<Key> plus_plus_rows() {
  return {
      integer("zero_hpz_partition_size", 1, "Ranks that hold a second partition of the parameters among them").at_least(0)
          .on_stages("3"),
      boolean("zero_quantized_weights", false, "Gather weights quantised")
          .refuse(When::True, "set it to false: quantised communication is not built yet").on_stages("3"),
      boolean("zero_quantized_nontrainable_weights", false, "Keep frozen weights quantised")
          .refuse(When::True, "set it to false: quantised weights are not built yet").on_stages("3"),
      boolean("zero_quantized_gradients", false, "Reduce gradients quantised")
          .refuse(When::True, "set it to false: quantised communication is not built yet").on_stages("3"),
      object("leaf_module", "Modules that are gathered as one unit, e.g. blocks of routed experts",
             {texts("classes",
                    Json::array({"transformers.models.mixtral.modeling_mixtral.MixtralSparseMoeBlock",
                                 "transformers.models.qwen2_moe.modeling_qwen2_moe.Qwen2MoeSparseMoeBlock",
                                 "transformers.models.qwen3_moe.modeling_qwen3_moe.Qwen3MoeSparseMoeBlock"}),
                    "By class; replaces the default list").or_one_text(),
              texts("names", Json::array(), "By module name").or_one_text(),
              texts("name_suffixes", Json::array(), "By the end of the module name").or_one_text()})
          .on_stages("3"),
  };
}

std::vector<Key> removed_rows() {
  const auto drop_it = "remove it; use zero_hpz_partition_size to shard within groups of ranks";
  return {
      any("zeropp_loco_param", nullptr, "Error feedback for quantised gradients").on_stages("3")
          .refuse(When::Given, "remove it: it no longer exists"),
      integer("mics_shard_size", -1, "Ranks in one sharding group").on_stages("3").refuse(When::AboveOne, drop_it),
      boolean("mics_hierarchical_params_gather", false, "Two-level gathers").on_stages("3").refuse(When::True, drop_it),
      boolean("cpu_offload", nullptr, "Old form of offload_optimizer").on_stages("1-2")
          .renamed("offload_optimizer", Move::ToCpuDevice),
      boolean("cpu_offload_param", nullptr, "Old form of offload_param").on_stages("3")
          .renamed("offload_param", Move::ToCpuDevice),
      boolean("cpu_offload_use_pin_memory", nullptr, "Old form of pin_memory; its value is not used")
          .renamed("", Move::Drop),
  };
}

Key offload_param_section() {
  return object("offload_param", "Where partitioned parameters rest; without effect below stage 3",
      {device_row(),
       text("nvme_path", nullptr, "Folder, for nvme; made if it is not there. Its files have no names and go with the process"),
       boolean("pin_memory", true, "Page-lock the staging memory of transfers to and from a GPU"),
       integer("buffer_count", 5, "Without effect: two units are in memory at a time").at_least(0).accepted(),
       integer("buffer_size", 100000000, "Without effect: what is gathered together is cut by stage3_prefetch_bucket_size and reduce_bucket_size").at_least(0).accepted(),
       integer("max_in_cpu", 1000000000, "For nvme: elements of each rank's parameters that stay in the host's memory").at_least(0)})
      .on_stages("3");
}

Key offload_optimizer_section() {
  return object("offload_optimizer", "Where optimizer states, master weights and gradient slices rest",
      {device_row(),
       text("nvme_path", nullptr, "Folder, for nvme; made if it is not there. Its files have no names and go with the process"),
       boolean("pin_memory", true, "Page-lock the staging memory of transfers to and from a GPU"),
       integer("buffer_count", 4, "For nvme: a step holds this many times 4 MiB of each state in memory (12 MiB with AdamW and bf16)").at_least(0),
       boolean("pipeline_read", false, "Without effect: tiles are always read ahead").accepted(),
       boolean("pipeline_write", false, "Without effect: tiles are always written behind").accepted(),
       boolean("fast_init", false, "Without effect: creation is fast").accepted(),
       number("ratio", 1.0, "Share of the states that rests there; below 1 only at stage 3").at_least(0).at_most(1),
       boolean("super_offload", false, "Slices are updated beside backward, as their gradients become final; takes the state's space twice"),
       number("cpuadam_cores_perc", 0.8, "Without effect: as many threads as torch uses").at_least(0).at_most(1).accepted()})
      .on_stages("1-3");
}

Key zenflow_section() {
  const Json automatic = "auto";
  return object("zenflow", "Update the most important columns on the device, the rest later on the host",
      {number("topk_ratio", 0.1, "Share of the columns updated on the device").above(0).below(1).accepted(),
       choice("select_strategy", automatic, {"auto", "step", "epoch"}, "When the columns are chosen").accepted(),
       any("select_interval", automatic, "Updates or epochs between choices").accepted(),
       any("update_interval", automatic, "Updates between dense updates").accepted(),
       boolean("overlap_step", false, "Dense update beside the next steps").accepted(),
       boolean("offload", false, "Chosen states on the host").accepted(),
       number("auto_ratio", 0.99, "Threshold of auto").at_least(0).at_most(1).accepted(),
       integer("full_warm_up_rounds", 0, "Dense rounds first").at_least(0).accepted(),
       number("pt_reserved_cores_perc", 0.5, "Share of the cores left to torch").at_least(0).at_most(1).accepted(),
       integer("steps_per_epoch", nullptr, "Found while training").accepted()})
      .on_stages("1-3")
      .refuse(When::Given, "remove it: ZenFlow is not built yet; offload_optimizer gives the plain form");
}

}  // namespace

std::vector<Key> zero_keys() {
  std::vector<Key> rows = partition_rows();
  for (auto part : {parameter_rows(), plus_plus_rows(), removed_rows()}) {
    for (Key& key : part) rows.push_back(std::move(key));
  }
  rows.push_back(offload_param_section());
  rows.push_back(offload_optimizer_section());
  rows.push_back(zenflow_section());
  return {object("zero_optimization", "Partitioning of the training state over the ranks; true and false mean stage 1 and 0",
                 std::move(rows)).numbers_as_text().or_bool(),
          boolean("zero_allow_untested_optimizer", false, "Let any client optimizer work on partitions").accepted(),
          boolean("zero_force_ds_cpu_optimizer", true, "Insist on the library's CPU optimizers with offload").accepted()};
}

}  // namespace ds::config
