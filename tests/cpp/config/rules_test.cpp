// SPDX-License-Identifier: Apache-2.0
#include "config/rules.h"

#include "helpers.h"

namespace ds::config {
namespace {

Options on_cuda() {
  Options options;
  options.device = Device::Cuda;
  return options;
}

TEST(Rules, DefaultsThatDependOnOthers) {
  EXPECT_TRUE(loaded(with_batch("zero_optimization: {stage: 3}")).zero.overlap_comm);
  EXPECT_FALSE(loaded(with_batch("zero_optimization: {stage: 2}")).zero.overlap_comm);
  EXPECT_FALSE(loaded(with_batch("zero_optimization: {stage: 3, overlap_comm: false}")).zero.overlap_comm);
  EXPECT_EQ(loaded(with_batch("zero_optimization: {reduce_bucket_size: 0}")).zero.reduce_bucket_numel, 500000000);
  EXPECT_EQ(loaded(with_batch("torch_autocast: {enabled: true}")).values["torch_autocast"]["dtype"], "bf16");
  EXPECT_EQ(loaded(with_batch("")).gradient_clipping, 1.0);
  EXPECT_EQ(loaded(with_batch("gradient_clipping: 'auto'")).gradient_clipping, 1.0);
}

TEST(Rules, Combinations) {
  const std::pair<const char*, const char*> cases[] = {
      {"fp16: {enabled: true}, bf16: {enabled: true}", "fp16.enabled, bf16.enabled: both are true"},
      {"fp16: {enabled: true, loss_scale_window: 0}", "fp16.loss_scale_window: found 0"},
      {"fp16: {enabled: true, min_loss_scale: 0}", "fp16.min_loss_scale: found 0"},
      {"fp16: {enabled: true, fp16_master_weights_and_grads: true}", "needs zero_optimization.stage 1, 2 or 3, found 0"},
      {"bf16: {enabled: true, bf16_master_weights_and_grads: true}", "needs zero_optimization.stage 1, 2 or 3, found 0"},
      {"zero_optimization: {stage: 1}, bf16: {bf16_optimizer_states: true}", "needs bf16.bf16_master_weights_and_grads true"},
      {"bf16: {split_master: true}", "bf16.split_master: found true; needs bf16.enabled true"},
      {"fp16: {enabled: true}, bf16: {split_master: true}", "bf16.split_master: found true; needs bf16.enabled true"},
      {"zero_optimization: {stage: 2, offload_optimizer: {ratio: 0.5}}",
       "below 1 is allowed at stage 3 only; zero_optimization.stage is 2"},
      {"zero_optimization: {stage: 3, compute_grad_norm: false}", "allowed at stages 1 and 2 only; zero_optimization.stage is 3"},
      {"zero_optimization: {stage: 2, compute_grad_norm: false}", "gradient_clipping is 1.0 (the default)"},
      {"zero_optimization: {stage: 3}, gradient_allreduce_op: 'SUM'", "only \"mean\" is allowed"},
      {"bf16: {enabled: true}, data_types: {param_dtype: 'fp16'}", "data_types.param_dtype: found \"fp16\""},
      {"data_efficiency: {data_sampling: {curriculum_learning: {enabled: true}}}", "curriculum_metrics: missing"},
      {"data_efficiency: {data_sampling: {curriculum_learning: {enabled: true, curriculum_metrics: {len: {}}}}}",
       "curriculum_metrics.len.min_difficulty: missing"},
      {"data_efficiency: {data_sampling: {curriculum_learning: {enabled: true, curriculum_metrics: {len: {min_difficulty: 9, "
       "max_difficulty: 8, schedule_type: 'custom', clustering_type: 'single_cluster'}}}}}",
       "curriculum_metrics.len.min_difficulty: found 9.0, above max_difficulty, 8.0"},
      {"data_efficiency: {data_sampling: {curriculum_learning: {enabled: true, curriculum_metrics: {len: {min_difficulty: 1, "
       "max_difficulty: 8, schedule_type: 'custom'}}}}}",
       "curriculum_metrics.len.index_to_sample_path: missing"},
      {"curriculum_learning: {enabled: true, schedule_type: 'fixed_root'}", "curriculum_learning.min_difficulty: missing"},
      {"curriculum_learning: {enabled: true, min_difficulty: 8, max_difficulty: 64, schedule_type: 'fixed_root', schedule_config: "
       "{difficulty_step: 8, total_curriculum_step: 9}}",
       "curriculum_learning.schedule_config.root_degree: missing; schedule_type \"fixed_root\" requires it"},
      {"curriculum_learning: {enabled: true, min_difficulty: 8, max_difficulty: 64, schedule_type: 'fixed_discrete', schedule_config: "
       "{difficulty: [8, 64], max_step: [1, 2]}}",
       "curriculum_learning.schedule_config.difficulty: has 2 items"},
      {"data_efficiency: {data_routing: {random_ltd: {enabled: true}}}", "random_ltd.total_layer_num: missing"},
      {"data_efficiency: {data_routing: {random_ltd: {enabled: true, total_layer_num: 2, random_ltd_layer_num: 1, random_ltd_layer_id: "
       "[2], model_type: 'decoder'}}}",
       "random_ltd_layer_id: found 2; allowed: 0 to total_layer_num - 1 = 1"},
      {"data_efficiency: {data_sampling: {dynamic_batching: {enabled: true}}}", "max_tokens: missing"},
  };
  for (const auto& [text, expected] : cases) EXPECT_HAS(refusal(with_batch(text)), expected) << text;
}

TEST(Rules, CombinationsThatAreFine) {
  for (const char* text : {
           "fp16: {enabled: true, loss_scale: 128, loss_scale_window: 0}", "fp16: {loss_scale_window: 0}",
           "zero_optimization: {stage: 2, compute_grad_norm: false}, gradient_clipping: 0",
           "zero_optimization: {stage: 2}, gradient_allreduce_op: 'sum'", "bf16: {enabled: true}, data_types: {param_dtype: 'bfloat16'}",
           "zero_optimization: {stage: 2, allgather_bucket_size: 7}", "prescale_gradients: true, zero_optimization: {stage: 3}",
       }) {
    EXPECT_EQ(refusal(with_batch(text)), "") << text;
  }
}

TEST(Rules, OffloadWithoutEffectIsDropped) {
  const Config config = loaded(with_batch("zero_optimization: {stage: 2, offload_param: {device: 'cpu'}}"), on_cuda());
  EXPECT_EQ(config.values["zero_optimization"]["offload_param"]["device"], "none");
  EXPECT_TRUE(config.is_set("zero_optimization.offload_param.device"));
  ASSERT_EQ(config.remarks.size(), 1u);
  EXPECT_EQ(config.remarks[0].level, Remark::Level::Info);
}

TEST(Rules, OffloadIsForEveryDevice) {
  for (const char* section : {"offload_optimizer", "offload_param"}) {
    const auto with = [&](const std::string& inside) { return with_batch("zero_optimization: {stage: 3, " + std::string(section) + ": {" + inside + "}}"); };
    for (const std::string& inside : {std::string("device: 'cpu'"), std::string("device: 'nvme', nvme_path: '/x'")}) {
      EXPECT_EQ(refusal(with(inside)), "");
      EXPECT_EQ(refusal(with(inside), on_cuda()), "");
    }
    EXPECT_HAS(refusal(with("device: 'nvme'")), std::string("zero_optimization.") + section + ".nvme_path: missing");
  }
}

TEST(Rules, RefusedWhenEnabled) {
  for (const char* text : {
           "sparse_gradients: true",
           "graph_harvesting: true",
           "amp: {enabled: true}",
           "elasticity: {enabled: true}",
           "nebula: {enabled: true}",
           "eigenvalue: {enabled: true}",
           "progressive_layer_drop: {enabled: true}",
           "quantize_training: {enabled: true}",
           "sparse_attention: {mode: 'fixed'}",
           "compression_training: {sparse_pruning: {shared_parameters: {enabled: true}}}",
           "zero_optimization: {stage: 3, mics_shard_size: 4}",
           "zero_optimization: {stage: 3, zeropp_loco_param: {err_beta: 0.8}}",
           "zero_optimization: {stage: 2, zenflow: {topk_ratio: 0.1}}",
           "zero_optimization: {stage: 1, legacy_stage1: true}",
           "zero_optimization: {stage: 3, zero_quantized_weights: true}",
           "bf16: {bf16_master_weights_and_grads: true}, zero_optimization: {stage: 1}",
           "autotuning: {enabled: true}",
           "hybrid_engine: {enabled: true}",
           "tensor_parallel: {autotp_size: 2}",
           "tensor_parallel: {tp: {tp_size: 2}}",
           "expert_parallel: {enabled: true}",
           "pipeline: {stages: 2}",
           "compile: {deepcompile: true}",
           "compile: {passes: ['z3']}",
           "aio: {use_gds: true}",
           "weight_quantization: {post_init_quant: {fc: {num_bits: 4}}}",
           "data_efficiency: {data_routing: {random_ltd: {layer_token_lr_schedule: {enabled: true}}}}",
       }) {
    EXPECT_HAS(refusal(with_batch(text)), "which cannot be honoured; ") << text;
  }
}

TEST(Rules, MonitorsAndTheProfilerCanBeSwitchedOn) {
  for (const char* section : {"flops_profiler", "tensorboard", "wandb", "csv_monitor", "comet"}) {
    EXPECT_NO_THROW(loaded(with_batch(std::string(section) + ": {enabled: true}"))) << section;
  }
}

TEST(Rules, PresentButOffIsAccepted) {
  for (const char* text : {
           "sparse_gradients: false",
           "amp: {enabled: false, opt_level: 'O1'}",
           "elasticity: {enabled: false, max_train_batch_size: 8}",
           "nebula: {enabled: false}",
           "eigenvalue: {enabled: 'no'}",
           "progressive_layer_drop: {enabled: false, theta: 0.5}",
           "compression_training: {sparse_pruning: {shared_parameters: {enabled: false, method: 'l1'}, different_groups: {a: {params: "
           "{dense_ratio: 0.5}}}}}",
           "zero_optimization: {mics_shard_size: -1, zeropp_loco_param: null}",
           "zero_optimization: {zenflow: null}",
           "hybrid_engine: {enabled: false, max_out_tokens: 5}",
           "tensor_parallel: {autotp_size: 1}",
           "pipeline: {stages: 1}",
           "pipeline: {stages: 'auto'}",
           "compile: {deepcompile: false, passes: null}",
           "weight_quantization: {}",
       }) {
    EXPECT_EQ(refusal(with_batch(text)), "") << text;
  }
}

}  // namespace
}  // namespace ds::config
