// SPDX-License-Identifier: Apache-2.0
// data_efficiency (curriculum, token dropping), the old form of a curriculum, and weight quantisation.
#include "config/schema.h"

namespace ds::config {

namespace {

const char* const kNotBuilt = "set it to false: it is not built yet";
const std::vector<std::string> kSchedules = {"fixed_linear", "fixed_root", "fixed_discrete", "custom"};

Key difficulty_schedule() {
  return object("schedule_config", "Depends on schedule_type",
      {integer("total_curriculum_step", nullptr, "Steps until the end is reached").at_least(1),
       integer("difficulty_step", nullptr, "Difficulties are multiples of it").at_least(1),
       integer("root_degree", nullptr, "Of fixed_root: 2 is a square root").at_least(1),
       integers("difficulty", nullptr, "Of fixed_discrete"),
       integers("max_step", nullptr, "Of fixed_discrete: last step of each difficulty but the last")});
}

Key curriculum_section() {
  return object(
      "curriculum_learning", "Easy samples first",
      {boolean("enabled", false, "Use it; needs curriculum_metrics"),
       text("data_cluster_path", nullptr, "Folder for files that are not needed here").accepted(),
       map_of("curriculum_metrics", "By name of the measure",
              {text("index_to_sample_path", nullptr, "Samples by difficulty, written by DataAnalyzer; without .bin or .idx"),
               text("index_to_metric_path", nullptr, "The difficulties"),
               choice("difficulty_type", nullptr, {"value", "percentile"},
                      "Whether a difficulty is a value of the measure or a share of the samples"),
               choice("clustering_type", nullptr, {"schedule_based", "single_cluster"}, "single_cluster: the measure chooses no samples"),
               number("min_difficulty", nullptr, "Start"), number("max_difficulty", nullptr, "End"),
               choice("schedule_type", nullptr, kSchedules, "Shape"), difficulty_schedule()})});
}

Key old_curriculum_section() {
  return object("curriculum_learning", "Sequences grow while training; the model gets `curriculum_seqlen`",
      {boolean("enabled", false, "Use it"),
       text("curriculum_type", "seqlen", "seqlen: passed to the model's forward; others only to be read from engine.curriculum_scheduler"),
       number("min_difficulty", nullptr, "Start"), number("max_difficulty", nullptr, "End"),
       choice("schedule_type", nullptr, kSchedules, "Shape"), difficulty_schedule()});
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
  return object(
      "random_ltd", "Drop tokens in the middle layers",
      {boolean("enabled", false, "Use it; needs all keys but model_mask_name and hidden_state_order"),
       integer("total_layer_num", nullptr, "Layers").at_least(1), integer("random_ltd_layer_num", nullptr, "Layers that drop").at_least(0),
       integers("random_ltd_layer_id", nullptr, "Which, counted from 0"),
       text("model_mask_name", nullptr, "Keyword of a layer's forward that is the attention mask"),
       choice("model_type", nullptr, {"encoder", "decoder"}, "Kind"),
       choice("hidden_state_order", nullptr, {"batch_seq_dim", "seq_batch_dim"}, "Order of dimensions; default batch_seq_dim"),
       object("random_ltd_schedule", "How many tokens stay",
              {integer("min_value", nullptr, "Tokens at the start").at_least(1),
               integer("max_value", nullptr, "Tokens at the end").at_least(1), choice("schedule_type", nullptr, {"fixed_linear"}, "Shape"),
               object("schedule_config", "Its numbers",
                      {integer("require_steps", nullptr, "Steps until the end is reached").at_least(1),
                       integer("seq_per_step", nullptr, "Numbers of tokens are multiples of it").at_least(1)})}),
       object("layer_token_lr_schedule", "Learning rate by tokens",
              {boolean("enabled", false, "Use it").refuse(When::True, kNotBuilt), any("total_layer_tokens", nullptr, "Tokens").accepted(),
               any("warmup_layer_tokens", nullptr, "Tokens").accepted()})});
}

}  // namespace

std::vector<Key> data_keys() {
  return {
      object("data_efficiency", "Which samples and tokens are used when",
             {boolean("enabled", false, "Outer switch; the inner ones decide").accepted(),
              integer("seed", 1234, "Of the curriculum's sampler"),
              object("data_sampling", "Order of samples",
                     {boolean("enabled", false, "Outer switch; the inner ones decide").accepted(),
                      integer("num_epochs", 1000, "Most epochs of a curriculum").at_least(1),
                      integer("num_workers", 0, "Processes of the data loader of a curriculum").at_least(0),
                      boolean("pin_memory", false, "Its batches in page-locked host memory"),
                      curriculum_section(), batching_section()}),
              object("data_routing", "Tokens in layers",
                     {boolean("enabled", false, "Outer switch; the inner ones decide").accepted(), token_dropping_section()})}),
      old_curriculum_section(),
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
