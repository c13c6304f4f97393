// SPDX-License-Identifier: Apache-2.0
#include "config/resolve.h"

#include <algorithm>
#include <functional>

#include "config/suggest.h"
#include "config/values.h"
#include "helpers.h"

namespace ds::config {
namespace {

const Json& zero_of(const Config& config) { return config.values["zero_optimization"]; }

// The first remark of the level, empty if there is none.
std::string remark(const Config& config, Remark::Level level = Remark::Level::Warning) {
  for (const Remark& item : config.remarks) {
    if (item.level == level) return item.text;
  }
  return "";
}

void walk(const Key& section, const std::string& path, const std::function<void(const Key&, const std::string&)>& visit) {
  for (const Key& child : section.children) {
    const std::string here = join(path, child.name);
    visit(child, here);
    if (child.type == Type::Object) walk(child, here, visit);
  }
}

TEST(Schema, EveryDefaultFitsItsOwnRow) {
  walk(training_schema(), "", [](const Key& key, const std::string& path) {
    if (key.fallback.is_null() || key.fallback == "auto" || key.status == Status::Ignored) return;
    Findings findings;
    typed_value(key, key.fallback, path, findings);
    EXPECT_TRUE(findings.clean()) << path;
  });
}

TEST(Schema, NamesAreUniqueAndRowsAreDocumented) {
  walk(training_schema(), "", [](const Key& key, const std::string& path) {
    std::set<std::string> names;
    for (const Key& child : key.children) {
      EXPECT_TRUE(names.insert(child.name).second) << path << "." << child.name;
      for (const std::string& alias : child.aliases) EXPECT_TRUE(names.insert(alias).second) << path << "." << alias;
    }
    if (!key.replaced_by.empty()) {
      const std::string parent = path.substr(0, path.rfind('.'));
      EXPECT_FALSE(canonical_path(join(parent, key.replaced_by)).empty()) << path;
    }
    for (const Refusal& refusal : key.refusals) EXPECT_FALSE(refusal.advice.empty()) << path;
  });
}

TEST(Resolve, NothingRefusesTheDefaults) {
  for (const Device device : {Device::Cpu, Device::Cuda}) {
    Options options;
    options.device = device;
    EXPECT_EQ(refusal(with_batch(""), options), "");
  }
}

TEST(Resolve, AutoAndNullMeanNotGivenEverywhere) {
  walk(training_schema(), "", [](const Key&, const std::string& path) {
    // These two are on as soon as they are there, whatever stands inside.
    if (path.rfind("zero_optimization.zenflow.", 0) == 0 || path.rfind("sparse_attention.", 0) == 0) return;
    for (const Json& value : {Json("auto"), Json(nullptr)}) {
      Json document = {{"train_micro_batch_size_per_gpu", 1}, {"gradient_accumulation_steps", 1}};
      std::string pointer = "/" + path;
      std::replace(pointer.begin(), pointer.end(), '.', '/');
      document[Json::json_pointer(pointer)] = value;
      if (path == "train_micro_batch_size_per_gpu") document["train_batch_size"] = 1;
      const Config config = load(document, {});
      EXPECT_EQ(config.given.count(path), 0u) << path;
    }
  });
}

TEST(Resolve, IntegersInTheirManyForms) {
  const char* const forms[] = {"500000000", "5e8", "500000000.0", "'500000000'"};
  for (const char* form : forms) {
    EXPECT_EQ(loaded(with_batch(std::string("zero_optimization: {reduce_bucket_size: ") + form + "}")).zero.reduce_bucket_numel, 500000000)
        << form;
  }
  for (const char* form : {"'5e8'", "0.5", "-1", "true", "1e30", "NaN", "Infinity", "[1]", "{}", "' 1'", "''"}) {
    EXPECT_HAS(refusal(with_batch(std::string("zero_optimization: {reduce_bucket_size: ") + form + "}")),
               "zero_optimization.reduce_bucket_size: found ")
        << form;
  }
  EXPECT_EQ(loaded(with_batch("zero_optimization: {sub_group_size: 1e14}")).zero.sub_group_numel, 100000000000000);
}

TEST(Resolve, StageForms) {
  for (const char* form : {"2", "2.0", "'2'"}) {
    EXPECT_EQ(loaded(with_batch(std::string("zero_optimization: {stage: ") + form + "}")).zero.stage, 2);
  }
  EXPECT_EQ(loaded(with_batch("zero_optimization: {stage: true}")).zero.stage, 1);
  for (const char* form : {"4", "-1", "2.5", "'two'"}) {
    EXPECT_HAS(refusal(with_batch(std::string("zero_optimization: {stage: ") + form + "}")), "allowed: an integer from 0 to 3") << form;
  }
  const Config legacy = loaded(with_batch("zero_optimization: true"));
  EXPECT_EQ(legacy.zero.stage, 1);
  EXPECT_HAS(remark(legacy), "use {\"stage\": 1}");
  EXPECT_EQ(loaded(with_batch("zero_optimization: false")).zero.stage, 0);
  EXPECT_HAS(refusal(with_batch("zero_optimization: 2")), "allowed: an object");
}

TEST(Resolve, TruthValues) {
  for (const char* form : {"true", "1", "1.0", "'true'", "'YES'", "'on'", "'1'"}) {
    EXPECT_TRUE(loaded(with_batch(std::string("fp16: {enabled: ") + form + "}")).fp16.enabled) << form;
  }
  for (const char* form : {"false", "0", "'False'", "'no'", "'off'"}) {
    EXPECT_FALSE(loaded(with_batch(std::string("fp16: {enabled: ") + form + "}")).fp16.enabled) << form;
  }
  for (const char* form : {"2", "'maybe'", "''", "[]"}) {
    EXPECT_HAS(refusal(with_batch(std::string("fp16: {enabled: ") + form + "}")), "allowed: true or false") << form;
  }
  EXPECT_HAS(refusal(with_batch("pipeline: {pipe_partitioned: 1}")), "pipeline.pipe_partitioned: found 1");
}

TEST(Resolve, ChoicesAndTypes) {
  EXPECT_HAS(refusal(with_batch("zero_optimization: {stage: 3, offload_param: {device: 'CPU'}}")),
             "offload_param.device: found \"CPU\" (string); allowed: one of \"none\", \"cpu\", \"nvme\"");
  EXPECT_EQ(loaded(with_batch("checkpoint: {tag_validation: 'FAIL'}")).values["checkpoint"]["tag_validation"], "Fail");
  for (const char* form : {"fp16", "FP16", "float16", "half", "torch.float16"}) {
    EXPECT_EQ(loaded(with_batch(std::string("communication_data_type: '") + form + "'")).communication.dtype, "fp16") << form;
  }
  EXPECT_HAS(refusal(with_batch("communication_data_type: 'int8'")), "allowed: one of \"fp32\", \"fp16\", \"bf16\"");
  EXPECT_HAS(refusal(with_batch("gradient_clipping: '1.0'")), "allowed: a number of at least 0");
  EXPECT_HAS(refusal(with_batch("gradient_clipping: -1")), "gradient_clipping: found -1");
  EXPECT_HAS(refusal(with_batch("steps_per_print: 0")), "or Infinity");
  EXPECT_HAS(refusal(with_batch("steps_per_print: NaN")), "found NaN");
  EXPECT_HAS(refusal(with_batch("fp16: {loss_scale: true}")), "fp16.loss_scale: found true");
  EXPECT_EQ(loaded(with_batch("fp16: {loss_scale: '128'}")).fp16.loss_scale, 128);
  EXPECT_HAS(refusal(with_batch("fp16: {min_loss_scale: 0.5}")), "fp16.min_loss_scale: found 0.5");
  EXPECT_HAS(refusal(with_batch("data_types: {keep_in_fp32_modules: 'x'}")), "a list of strings or \"auto\"");
  EXPECT_EQ(zero_of(loaded(with_batch("zero_optimization: {leaf_module: {classes: 'A'}}")))["leaf_module"]["classes"], Json::array({"A"}));
}

TEST(Resolve, UnknownKeys) {
  EXPECT_HAS(refusal(with_batch("zero_optimization: {stagee: 1}")),
             "zero_optimization.stagee: unknown key; nearest known key: zero_optimization.stage");
  EXPECT_HAS(refusal(with_batch("bf16: {loss_scale: 1}")), "bf16.loss_scale: unknown key; known elsewhere as fp16.loss_scale");
  EXPECT_HAS(refusal(with_batch("activation_checkpointing: {partitioned_activations: true}")),
             "activation_checkpointing.partition_activations");
  const Config config = loaded(with_batch("zero_optimisation: {stage: 3}, xyz: 1"));
  ASSERT_EQ(config.remarks.size(), 1u);
  EXPECT_HAS(remark(config), "\"zero_optimisation\" (nearest known key: zero_optimization)", "\"xyz\"");
}

TEST(Resolve, Strict) {
  EXPECT_HAS(refusal(with_batch("strict: true, xyz: 1")), "xyz: unknown key");
  EXPECT_HAS(refusal(with_batch("strict: true, aio: {thread_count: 1}")), "aio.thread_count: has no effect");
  EXPECT_HAS(refusal(with_batch("strict: true, 'fp16.enabled': 1")), "fp16.enabled: unknown key");
  EXPECT_EQ(refusal(with_batch("strict: true, _comment: 1")), "");
  Options options;
  options.strict = true;
  EXPECT_HAS(refusal(with_batch("xyz: 1"), options), "xyz: unknown key");
  options.strict = false;
  EXPECT_EQ(refusal(with_batch("strict: true, xyz: 1"), options), "");
}

TEST(Resolve, KeysThatPeopleWriteAreTolerated) {
  const Config config = loaded(with_batch("aio: {thread_count: 1}, comms_config: {}, monitor_config: {}, fp8: {}, _comment: 'x', "
                                          "compile: {disable: true, backend: 'inductor', enabled: true, kwargs: {}}"));
  ASSERT_EQ(config.remarks.size(), 1u);
  EXPECT_HAS(remark(config), "no effect", "\"aio.thread_count\"", "\"compile.kwargs\"");
  EXPECT_LACKS(remark(config), "_comment");
}

TEST(Resolve, DottedNamesAtTheTop) {
  const Config config = loaded(with_batch("'zero_optimization.reduce_bucket_size': 5.5"));
  EXPECT_EQ(config.zero.reduce_bucket_numel, 500000000);
  EXPECT_EQ(remark(config), "");
  EXPECT_HAS(remark(config, Remark::Level::Info), "zero_optimization.reduce_bucket_size");
}

TEST(Resolve, Aliases) {
  const Config config = loaded(with_batch("zero_optimization: {stage: 3, stage3_prefetch_bucket_size: 7}, bfloat16: {enabled: true}"));
  EXPECT_EQ(config.zero.prefetch_numel, 7);
  EXPECT_TRUE(config.bf16.enabled);
  EXPECT_TRUE(config.is_set("zero_optimization.prefetch_bucket_size"));
  EXPECT_TRUE(config.is_set("zero_optimization.stage3_prefetch_bucket_size"));
  EXPECT_TRUE(config.is_set("bfloat16.enabled"));
  EXPECT_FALSE(config.is_set("zero_optimization.max_live_parameters"));
  EXPECT_THROW(config.is_set("zero_optimization.nonsense"), ds::ValueError);
  EXPECT_HAS(refusal(with_batch("zero_optimization: {prefetch_bucket_size: 1, stage3_prefetch_bucket_size: 1}")), "written twice");
  EXPECT_EQ(refusal(with_batch("zero_optimization: {prefetch_bucket_size: 1, stage3_prefetch_bucket_size: 'auto'}")), "");
  EXPECT_HAS(refusal(with_batch("bf16: {}, bfloat16: {}")), "written twice, as \"bf16\" and as \"bfloat16\"");
}

TEST(Resolve, DeprecatedKeysMove) {
  const Config config = loaded(with_batch("zero_optimization: {stage: 3, cpu_offload: true, cpu_offload_param: true, "
                                          "cpu_offload_use_pin_memory: true, stage3_gather_fp16_weights_on_model_save: true}"));
  EXPECT_EQ(zero_of(config)["offload_optimizer"]["device"], "cpu");
  EXPECT_EQ(zero_of(config)["offload_param"]["device"], "cpu");
  EXPECT_EQ(zero_of(config)["gather_16bit_weights_on_model_save"], true);
  EXPECT_EQ(config.remarks.size(), 4u);
  EXPECT_TRUE(config.is_set("zero_optimization.offload_optimizer"));
  EXPECT_EQ(zero_of(loaded(with_batch("zero_optimization: {stage: 2, cpu_offload: false}")))["offload_optimizer"]["device"], "none");
  for (const char* both : {"cpu_offload: false, offload_optimizer: {}", "cpu_offload_param: true, offload_param: {}",
                           "stage3_gather_fp16_weights_on_model_save: true, stage3_gather_16bit_weights_on_model_save: true"}) {
    EXPECT_HAS(refusal(with_batch(std::string("zero_optimization: {stage: 2, ") + both + "}")), "which replaced it, is given too") << both;
  }
}

TEST(Resolve, AllProblemsAtOnce) {
  EXPECT_HAS(refusal("{train_batch_size: -1, fp16: {enabled: 3, x: 1}, bf16: 5}"), "4 problems", "train_batch_size: found -1",
             "fp16.enabled", "fp16.x", "bf16: found 5");
  EXPECT_LACKS(refusal("{train_batch_size: -1, fp16: {enabled: 3, x: 1}, bf16: 5}"), "does not hold");
}

TEST(Suggest, Distance) {
  EXPECT_EQ(edit_distance("stage", "stage"), 0u);
  EXPECT_EQ(edit_distance("Stage", "stage"), 0u);
  EXPECT_EQ(edit_distance("satge", "stage"), 1u);
  EXPECT_EQ(edit_distance("stag", "stage"), 1u);
  EXPECT_EQ(edit_distance("", "abc"), 3u);
}

TEST(Paths, Canonical) {
  EXPECT_EQ(canonical_path("zero_optimization.stage3_max_live_parameters"), "zero_optimization.max_live_parameters");
  EXPECT_EQ(canonical_path("optimizer.params.anything.below"), "optimizer.params.anything.below");
  EXPECT_EQ(canonical_path("nope"), "");
  EXPECT_EQ(canonical_path(""), "");
  EXPECT_EQ(canonical_path("fp16.enabled.more"), "");
}

}  // namespace
}  // namespace ds::config
