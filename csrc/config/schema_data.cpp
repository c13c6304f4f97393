// SPDX-License-Identifier: Apache-2.0
// data_efficiency (curriculum, token dropping) and weight quantisation.
#include "config/schema.h"

namespace ds::config {

namespace {

const char* const kNotBuilt = "set it to false: it is not built yet";

Key metric_schedule() {
  return object("schedule_config", "Depends on schedule_type",
      {integer("total_curriculum_step", nullptr, "Length").at_least(1).accepted(),
       integer("difficulty_step", nullptr, "Smallest change").at_least(1).accepted(),
       integer("root_degree", nullptr, "Of fixed_root").at_least(1).accepted(),
       integers("difficulty", nullptr, "Of fixed_discrete").accepted(),
       integers("max_step", nullptr, "Of fixed_discrete, one fewer").accepted()});
}

Key curriculum_section() {
  return object("curriculum_learning", "Easy samples first",
      {boolean("enabled", false, "Use it; needs curriculum_metrics").refuse(When::True, kNotBuilt),
       text("data_cluster_path", nullptr, "Index files").accepted(),
       map_of("curriculum_metrics", "By name of the measure",
              {text("index_to_sample_path", nullptr, "File").accepted(),
               text("index_to_metric_path", nullptr, "File").accepted(),
               choice("difficulty_type", nullptr, {"value", "percentile"}, "What a difficulty is").accepted(),
               choice("clustering_type", nullptr, {"schedule_based", "single_cluster"}, "How samples are grouped").accepted(),
               number("min_difficulty", nullptr, "Start").accepted(), number("max_difficulty", nullptr, "End").accepted(),
               choice("schedule_type", nullptr, {"fixed_linear", "fixed_root", "fixed_discrete", "custom"}, "Shape").accepted(),
               metric_schedule()})});
}

Key batching_section() {
  return object("dynamic_batching", "Batches of equal numbers of tokens",
      {boolean("enabled", false, "Use it; needs max_tokens").refuse(When::True, kNotBuilt),
       choice("lr_scaling_method", "linear", {"linear", "sqrt", "none"}, "Learning rate by batch").accepted(),
       integer("min_batch_size", 1, "Samples").at_least(1).accepted(),
       integer("max_batch_size", nullptr, "Samples").at_least(1).accepted(),
       choice("sequence_picking_order", "dataloader", {"dataloader", "random", "seqlen"}, "Order").accepted(),
       integer("max_tokens", nullptr, "Tokens in a batch").at_least(1).accepted(),
       text("metrics_path", nullptr, "File").accepted(),
       boolean("verbose", false, "Report").accepted()});
}

Key token_dropping_section() {
  return object("random_ltd", "Drop tokens in the middle layers",
      {boolean("enabled", false, "Use it").refuse(When::True, kNotBuilt),
       integer("total_layer_num", nullptr, "Layers").at_least(1).accepted(),
       integer("random_ltd_layer_num", nullptr, "Layers that drop").at_least(0).accepted(),
       integers("random_ltd_layer_id", nullptr, "Which").accepted(),
       any("model_mask_name", nullptr, "Argument that is the mask").accepted(),
       choice("model_type", nullptr, {"encoder", "decoder"}, "Kind").accepted(),
       choice("hidden_state_order", nullptr, {"batch_seq_dim", "seq_batch_dim"}, "Order of dimensions").accepted(),
       object("random_ltd_schedule", "How many tokens stay",
              {integer("min_value", nullptr, "Start").accepted(), integer("max_value", nullptr, "End").accepted(),
               choice("schedule_type", nullptr, {"fixed_linear"}, "Shape").accepted(),
               object("schedule_config", "Its numbers",
                      {integer("require_steps", nullptr, "Length").at_least(1).accepted(),
                       integer("seq_per_step", nullptr, "Change").at_least(1).accepted()})}),
       object("layer_token_lr_schedule", "Learning rate by tokens",
              {boolean("enabled", false, "Use it").refuse(When::True, kNotBuilt),
               any("total_layer_tokens", nullptr, "Tokens").accepted(), any("warmup_layer_tokens", nullptr, "Tokens").accepted()})});
}

}  // namespace

std::vector<Key> data_keys() {
  return {
      object("data_efficiency", "Which samples and tokens are used when",
             {boolean("enabled", false, "Outer switch; the inner ones decide").accepted(),
              integer("seed", 1234, "Seed of the sampler").accepted(),
              object("data_sampling", "Order of samples",
                     {boolean("enabled", false, "Outer switch; the inner ones decide").accepted(),
                      integer("num_epochs", 1000, "Most epochs").at_least(1).accepted(),
                      integer("num_workers", 0, "Processes of the data loader").at_least(0).accepted(),
                      boolean("pin_memory", false, "Page-locked host memory").accepted(),
                      curriculum_section(), batching_section()}),
              object("data_routing", "Tokens in layers",
                     {boolean("enabled", false, "Outer switch; the inner ones decide").accepted(), token_dropping_section()})}),
      object("weight_quantization", "Quantised weights for inference with partitions",
             {free_form("quantized_initialization", Json::object(), "While the model is made")
                  .refuse(When::Given, "remove it: quantised weights are not built yet"),
              free_form("post_init_quant", Json::object(), "After the model is made, by part of the name")
                  .refuse(When::Given, "remove it: quantised weights are not built yet"),
              boolean("enabled", true, "Read by nothing").accepted(),
              integer("num_bits", 8, "Read by nothing").accepted(),
              choice("q_type", "symmetric", {"symmetric", "asymmetric"}, "Read by nothing").accepted(),
              integer("q_groups", 1, "Read by nothing").accepted()})
          .numbers_as_text(),
  };
}

}  // namespace ds::config
