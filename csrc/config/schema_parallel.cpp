// SPDX-License-Identifier: Apache-2.0
// Ways to split a model over ranks other than ZeRO, and whole-model rewriting.
#include "config/schema.h"

namespace ds::config {

namespace {

const char* const kNoTensor = "set it to 1: automatic tensor parallelism is not built yet";

Key pipeline_section() {
  return object("pipeline", "Pipeline parallelism; the number of stages is that of the PipelineModule",
      {any("stages", "auto", "Number of stages")
           .refuse(When::AboveOne, "remove it or set it to 1: pipeline parallelism is not built yet"),
       text("partition", "best", "How layers are divided").accepted(),
       any("seed_layers", false, "One seed a layer").accepted(),
       integer("activation_checkpoint_interval", 0, "Layers between checkpoints; 0: the module's own").at_least(0).accepted(),
       boolean("use_reentrant", nullptr, "Kind of checkpointing; null: reentrant").accepted(),
       boolean("pipe_partitioned", true, "Split what passes between stages").strict_bool().accepted(),
       boolean("grad_partitioned", true, "Split its gradient").strict_bool().accepted()});
}

Key hybrid_engine_section() {
  return object("hybrid_engine", "One engine that trains and generates",
      {boolean("enabled", false, "Use it")
           .refuse(When::True, "set it to false: the hybrid engine is not built yet; engine.module.generate() works"),
       integer("max_out_tokens", 512, "Longest prompt and answer").at_least(1).accepted(),
       integer("inference_tp_size", 1, "Ranks in one generation").at_least(1).accepted(),
       boolean("release_inference_cache", false, "Free the cache after generating").accepted(),
       boolean("pin_parameters", true, "Keep parameters gathered").accepted(),
       integer("tp_gather_partition_size", 8, "Ranks gathered at once").at_least(1).accepted(),
       boolean("enable_cuda_graph", false, "CUDA graphs").accepted()})
      .numbers_as_text();
}

Key partition_config_section() {
  return object("partition_config", "Own rules for dividing weights",
      {boolean("use_default_specs", true, "After these, those of the preset").accepted(),
       boolean("strict_mode", false, "Every Linear must match").accepted(),
       integer("tp_size", 1, "Taken from autotp_size").at_least(1).accepted(),
       integer("embedding_partition_dim", 1, "Dimension of embeddings").accepted(),
       texts("lm_head_patterns", Json::array({"lm_head", "embed_out"}), "Output layers").accepted(),
       list_of("layer_specs", "First match wins",
               {texts("patterns", Json::array(), "Regular expressions of parameter names").accepted(),
                choice("partition_type", "column", {"column", "row", "skip"}, "Which way").accepted(),
                any("shape", nullptr, "Parts of a fused weight").accepted(),
                integer("partition_dim", nullptr, "Dimension").accepted(),
                texts("model_types", nullptr, "Only for these models").accepted(),
                boolean("gather_output", false, "Gather afterwards").accepted(),
                boolean("grad_allreduce", false, "Reduce its gradient").accepted()})});
}

Key tensor_parallel_section() {
  return object("tensor_parallel", "Automatic tensor parallelism",
      {integer("autotp_size", 0, "Ranks in one model; 0 or 1: off").at_least(0).refuse(When::AboveOne, kNoTensor),
       boolean("tp_overlap_comm", false, "Reduce while backward goes on").accepted(),
       text("preset_model", nullptr, "Rules of a known model").accepted(),
       partition_config_section(),
       dtype("dtype", nullptr, "Type of the weights").accepted(),
       object("tensor_parallel", "The group",
              {integer("tp_size", 1, "Ranks in one model").at_least(1).refuse(When::AboveOne, kNoTensor),
               integer("tp_grain_size", 1, "Divisibility").at_least(1).accepted(),
               any("mpu", nullptr, "A Python object").accepted(), any("tp_group", nullptr, "A Python object").accepted()})
           .alias("tp"),
       boolean("vocab_parallel_lm_head", nullptr, "Divide the output layer").accepted(),
       choice("vocab_parallel_ce_backend", "torch", {"torch", "liger"}, "Its loss").accepted(),
       boolean("keep_module_on_host", false, "Leave the module where it is").accepted(),
       boolean("replace_with_kernel_inject", false, "Without effect").alias("kernel_inject").accepted(),
       any("injection_policy_tuple", nullptr, "Without effect").accepted()})
      .numbers_as_text();
}

Key expert_parallel_section() {
  std::vector<Key> rows = {
      boolean("enabled", false, "Use it").refuse(When::True, "set it to false: expert parallelism is not built yet"),
      integer("autoep_size", 1, "Ranks that share the experts").at_least(1).accepted(),
      text("preset_model", nullptr, "Rules of a known model").accepted(),
      boolean("use_grouped_mm", true, "Grouped products").accepted(),
      boolean("disable_triton_grouped_mm", false, "Without Triton").accepted(),
      integer("expert_tensor_parallel_size", 1, "Only 1").at_least(1).at_most(1).accepted(),
      number("route_scale", 1.0, "Factor of the routing weights").accepted(),
      integer("num_expert_groups", nullptr, "Groups of experts").at_least(1).accepted(),
      integer("num_limited_groups", nullptr, "Groups a token may use").at_least(1).accepted()};
  const std::vector<Key> more = names_only(
      {"moe_layer_pattern", "router_pattern", "expert_pattern", "shared_experts_pattern", "shared_experts_gate_pattern",
       "expert_w1", "expert_w2", "expert_w3", "num_experts_attr", "top_k_attr", "has_shared_experts", "top_k",
       "routed_scaling_factor", "score_func", "score_apply", "route_norm", "combine_impl", "row_weighting_impl",
       "gate_up_impl", "comm_backend", "comm_num_sm", "comm_qp_margin", "comm_max_tokens_per_rank", "async_split_plan",
       "validate_folding_routing", "expert_activation", "load_balance_coeff"});
  rows.insert(rows.end(), more.begin(), more.end());
  return object("expert_parallel", "Automatic expert parallelism", std::move(rows));
}

Key compile_section() {
  std::vector<Key> rows = {
      boolean("deepcompile", false, "Own compiler passes")
          .refuse(When::True, "set it to false: torch.compile works without it"),
      texts("passes", nullptr, "Passes of it: z1, z3, autosp, autotp")
          .refuse(When::Given, "remove it: compiler passes are not built yet"),
      boolean("autoep_non_moe", false, "Compile all but the experts")
          .refuse(When::True, "set it to false: it is not built yet"),
      integer("free_activation_threshold", 10485760, "Bytes").at_least(0).accepted()};
  const auto flag = [&rows](const char* name, bool fallback) {
    rows.push_back(boolean(name, fallback, "Of deepcompile").accepted());
  };
  for (const char* name : {"offload_parameters", "offload_opt_states", "offload_activation", "free_activation",
                           "symmetric_memory", "sync_before_reduce", "sync_after_reduce", "sync_before_allgather",
                           "sync_after_allgather", "keep_all_input_tensors", "debug_log"}) {
    flag(name, false);
  }
  for (const char* name : {"offload_activation_pin_memory", "double_buffer", "keep_int_input_tensors"}) flag(name, true);
  for (const char* name : {"enabled", "disable", "backend", "kwargs"}) {
    rows.push_back(any(name, nullptr, "Of an older form; call engine.compile() instead").ignored());
  }
  return object("compile", "Settings of engine.compile(); the section alone compiles nothing", std::move(rows))
      .numbers_as_text();
}

}  // namespace

std::vector<Key> parallel_keys() {
  return {pipeline_section(), hybrid_engine_section(), tensor_parallel_section(), expert_parallel_section(), compile_section()};
}

}  // namespace ds::config
