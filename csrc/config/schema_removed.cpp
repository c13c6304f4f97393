// SPDX-License-Identifier: Apache-2.0
// Sections that DeepSpeed had up to 0.19.6. A file that merely carries them, switched off, still loads.
// All of them but sparse_attention were off unless their "enabled" said otherwise.
#include "config/schema.h"

namespace ds::config {

namespace {

Key switched(const char* name, const char* doc, const char* advice, const std::vector<std::string>& names) {
  const bool by_flag = names.front() == "enabled";
  return object(name, doc, names_only(names)).refuse(by_flag ? When::Enabled : When::Given, advice);
}

Key technique(const char* name, const std::vector<std::string>& shared, const std::vector<std::string>& params) {
  return object(name, "",
      {object("shared_parameters", "", names_only(shared)),
       map_of("different_groups", "",
              {object("params", "", names_only(params)), any("modules", nullptr, "").accepted(),
               any("related_modules", nullptr, "").accepted()})});
}

Key compression_section() {
  return object("compression_training", "Quantising and pruning while training",
      {technique("weight_quantization",
                 {"enabled", "quantizer_kernel", "schedule_offset", "quantize_groups", "quantize_verbose", "quantization_type",
                  "rounding", "quantize_weight_in_forward", "fp16_mixed_quantize"},
                 {"start_bits", "target_bits", "quantization_period"}),
       technique("activation_quantization", {"enabled", "quantization_type", "range_calibration", "schedule_offset"}, {"bits"}),
       technique("sparse_pruning",
                 {"enabled", "method", "schedule_offset", "schedule_offset_end", "schedule_offset_stride", "block_pattern",
                  "dense_ratio", "excluded_modules"},
                 {"dense_ratio"}),
       technique("row_pruning", {"enabled", "method", "schedule_offset"}, {"dense_ratio"}),
       technique("channel_pruning", {"enabled", "method", "schedule_offset"}, {"dense_ratio"}),
       technique("head_pruning", {"enabled", "method", "schedule_offset", "num_heads"}, {"dense_ratio"}),
       object("layer_reduction", "",
              names_only({"enabled", "keep_number_layer", "module_name_prefix", "teacher_layer", "other_module_name"}))})
      .refuse(When::Enabled, "remove it: compression while training is not part of this library");
}

}  // namespace

std::vector<Key> removed_keys() {
  return {
      boolean("sparse_gradients", false, "Gradients of embeddings as index and value")
          .refuse(When::True, "set it to false: gradients are reduced dense"),
      object("amp", "Apex mixed precision", {boolean("enabled", false, "").refuse(When::True, "use fp16 or bf16 instead"),
                                             any("opt_level", nullptr, "").accepted()}),
      switched("nebula", "Checkpoints of a cloud service", "remove it: checkpoints are written asynchronously anyway",
               {"enabled", "persistent_storage_path", "persistent_time_interval", "num_of_version_in_retention",
                "enable_nebula_load", "nebula_load_path"}),
      compression_section(),
      switched("quantize_training", "Quantisation that grows while training", "remove it: it is not part of this library",
               {"enabled", "quantize_verbose", "quantizer_kernel", "quantize_type", "quantize_bits", "quantize_schedule",
                "quantize_groups", "fp16_mixed_quantize", "quantize_rounding", "quantize_algo", "eigenvalue"}),
      switched("eigenvalue", "Curvature of layers", "remove it: it is not part of this library",
               {"enabled", "verbose", "max_iter", "tol", "stability", "gas_boundary_resolution", "layer_name", "layer_num"}),
      switched("sparse_attention", "Block-sparse attention", "remove it: use the attention of the model",
               {"mode", "block", "different_layout_per_head", "num_local_blocks", "num_global_blocks", "attention",
                "horizontal_global_attention", "num_different_global_patterns", "num_random_blocks",
                "num_sliding_window_blocks", "local_window_blocks", "global_block_indices", "global_block_end_indices"}),
      switched("elasticity", "Batch sizes for changing numbers of ranks",
               "set \"enabled\" to false and give the batch sizes; any checkpoint loads on any number of ranks",
               {"enabled", "max_train_batch_size", "micro_batch_sizes", "min_gpus", "max_gpus", "min_time",
                "prefer_larger_batch", "prefer_large_batch", "ignore_non_elastic_batch_info", "version",
                "num_gpus_per_node", "model_parallel_size"}),
      boolean("graph_harvesting", false, "CUDA graphs of the step").refuse(When::True, "set it to false"),
      switched("progressive_layer_drop", "Skip layers at random", "remove it: it is not part of this library",
               {"enabled", "theta", "gamma"}),
  };
}

}  // namespace ds::config
