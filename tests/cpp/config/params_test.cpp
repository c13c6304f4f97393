// SPDX-License-Identifier: Apache-2.0
#include "helpers.h"

namespace ds::config {
namespace {

std::string optimizer(const std::string& type, const std::string& params) {
  return with_batch("optimizer: {type: '" + type + "', params: {" + params + "}}");
}
std::string scheduler(const std::string& type, const std::string& params) {
  return with_batch("scheduler: {type: '" + type + "', params: {" + params + "}}");
}

TEST(OptimizerParams, StayTheUsersOwn) {
  const Config config = loaded(optimizer("adamw", "lr: 1e-4, betas: [0.9, 0.95], eps: 'auto', weight_decay: 0"));
  EXPECT_EQ(config.values["optimizer"]["type"], "AdamW");
  EXPECT_EQ(config.values["optimizer"]["params"].dump(), R"({"lr":0.0001,"betas":[0.9,0.95],"weight_decay":0})");
  EXPECT_TRUE(config.is_set("optimizer.params.lr"));
  EXPECT_FALSE(config.is_set("optimizer.params.eps"));
}

TEST(OptimizerParams, AreCheckedForBuiltInTypes) {
  EXPECT_HAS(refusal(optimizer("Adam", "beta: [0.9, 0.99]")),
             "optimizer.params.beta: unknown key; nearest known key: optimizer.params.betas");
  EXPECT_HAS(refusal(optimizer("Adam", "lr: '1e-4'")), "optimizer.params.lr: found \"1e-4\" (string)");
  EXPECT_HAS(refusal(optimizer("Adam", "betas: [0.9]")), "a list of 2 numbers");
  EXPECT_HAS(refusal(optimizer("Adam", "betas: [0.9, 1.0]")), "to below 1");
  EXPECT_HAS(refusal(optimizer("Adam", "lr: -1")), "optimizer.params.lr: found -1");
  EXPECT_HAS(refusal(optimizer("Lion", "eps: 1e-8")), "optimizer.params.eps: unknown key");
  EXPECT_HAS(refusal(optimizer("SGD", "momentun: 0.9")), "optimizer.params.momentum");
  EXPECT_HAS(refusal(optimizer("Muon", "ns_method: 'x'")), "\"gram\", \"standard\"");
  for (const char* type : {"Adam", "AdamW", "Lamb", "Lion", "Adagrad", "Muon", "SGD"})
    EXPECT_EQ(refusal(optimizer(type, "lr: 0.1")), "") << type;
}

TEST(OptimizerParams, TorchSwitches) {
  EXPECT_HAS(refusal(optimizer("AdamW", "fused: true")), "pass with \"torch_adam\": true");
  EXPECT_EQ(refusal(optimizer("AdamW", "fused: true, amsgrad: true, torch_adam: true, maximize: false")), "");
  EXPECT_HAS(refusal(optimizer("AdamW", "amsgrad: true")), "optimizer.params.amsgrad: found true, which cannot be honoured");
  EXPECT_EQ(refusal(optimizer("SGD", "foreach: true")), "");
  EXPECT_EQ(refusal(optimizer("RMSprop", "anything: {goes: 1}")), "");
}

TEST(OptimizerParams, MaxGradNorm) {
  EXPECT_HAS(refusal(optimizer("Adam", "max_grad_norm: 1.0")), "use the top-level key gradient_clipping");
  EXPECT_HAS(refusal(optimizer("RMSprop", "max_grad_norm: 1.0")), "gradient_clipping");
  EXPECT_EQ(refusal(optimizer("Adam", "max_grad_norm: 'auto'")), "");
}

TEST(OptimizerParams, TypesThatAreGone) {
  for (const char* type : {"OneBitAdam", "OneBitLamb", "ZeroOneAdam", "MuAdam"}) {
    EXPECT_HAS(refusal(optimizer(type, "lr: 0.1")), "optimizer.type: found") << type;
  }
}

TEST(OptimizerParams, WithoutTypeAreDropped) {
  const Config config = loaded(with_batch("optimizer: {params: {lr: 1}}"));
  EXPECT_TRUE(config.values["optimizer"]["type"].is_null());
  EXPECT_TRUE(config.values["optimizer"]["params"].empty());
  ASSERT_EQ(config.remarks.size(), 1u);
}

TEST(SchedulerParams, WarmupSteps) {
  const auto steps = [](const std::string& value) {
    return loaded(scheduler("WarmupLR", "warmup_num_steps: " + value)).values["scheduler"]["params"]["warmup_num_steps"];
  };
  EXPECT_EQ(steps("0"), 2);
  EXPECT_EQ(steps("1e3"), 1000);
  EXPECT_TRUE(steps("1e3").is_number_integer());
  EXPECT_HAS(refusal(scheduler("WarmupLR", "warmup_num_steps: 1.5")), "scheduler.params.warmup_num_steps: found 1.5");
  EXPECT_HAS(refusal(scheduler("WarmupLR", "warmup_num_steps: -1")), "found -1");
}

TEST(SchedulerParams, AreCheckedForBuiltInTypes) {
  EXPECT_HAS(refusal(scheduler("WarmupDecayLR", "")), "scheduler.params.total_num_steps: missing; WarmupDecayLR requires it");
  EXPECT_EQ(refusal(scheduler("WarmupDecayLR", "total_num_steps: 'auto'")), "");
  EXPECT_EQ(refusal(scheduler("WarmupCosineLR", "total_num_steps: 1e4, warmup_num_steps: 10")), "");
  EXPECT_HAS(refusal(scheduler("OneCycle", "cycle_min_lr: 0.1")), "cycle_max_lr: missing");
  EXPECT_EQ(refusal(scheduler("OneCycle", "cycle_min_lr: [0.1, 0.2], cycle_max_lr: 0.3")), "");
  EXPECT_HAS(refusal(scheduler("WarmupLR", "warmup_max: 1")), "scheduler.params.warmup_max_lr");
  EXPECT_HAS(refusal(scheduler("LRRangeTest", "lr_range_test_step_size: 0")), "above 0");
  EXPECT_EQ(refusal(scheduler("StepLR", "step_size: 3")), "");
  EXPECT_EQ(loaded(with_batch("scheduler: {type: 'WarmupLR'}")).values["scheduler"]["params"], Json::object());
}

}  // namespace
}  // namespace ds::config
