// SPDX-License-Identifier: Apache-2.0
// Number formats: fp16, bf16, autocast, and the types of gradients, parameters and buffers.
#include "config/schema.h"

namespace ds::config {

namespace {

Key fp16_section() {
  return object("fp16", "Training with 16-bit floats and loss scaling",
      {boolean("enabled", false, "Weights in fp16 with fp32 master weights"),
       boolean("auto_cast", false, "Cast the positional floating-point inputs of forward to fp16"),
       number("loss_scale", 0.0, "Fixed loss scale; 0: found while training").at_least(0),
       integer("initial_scale_power", 16, "The first dynamic loss scale is 2 to this power").at_least(0).at_most(126),
       integer("loss_scale_window", 1000, "Clean updates before the scale is doubled; above 0 when dynamic"),
       integer("hysteresis", 2, "Overflows borne before the scale is halved").at_least(0),
       boolean("consecutive_hysteresis", false, "A clean update restores the borne overflows"),
       integer("min_loss_scale", 1, "The dynamic scale never falls below this; above 0 when dynamic"),
       boolean("fp16_master_weights_and_grads", false, "Master weights and gradients in fp16 too")
           .refuse(When::True, "remove it: master weights are kept in fp32")})
      .numbers_as_text();
}

Key bf16_section() {
  return object("bf16", "Training with bfloat16, without loss scaling",
      {boolean("enabled", false, "Weights in bf16 with fp32 master weights and fp32 accumulation"),
       boolean("immediate_grad_update", false, "Gradients are always accumulated as they appear").accepted(),
       boolean("check_grad_overflow", true, "Skip the update when a gradient is not finite; false: make it all the same"),
       boolean("bf16_master_weights_and_grads", false, "Master weights and gradients in bf16 too")
           .refuse(When::True, "remove it: master weights are kept in fp32"),
       boolean("bf16_optimizer_states", false, "Optimizer states in bf16; needs bf16_master_weights_and_grads")
           .refuse(When::True, "remove it: optimizer states are kept in fp32"),
       boolean("split_master", false,
               "An fp32 master is kept as its bf16 weight and the 16 bits that it lacks: 12 bytes a parameter with Adam instead of 14, and the same "
               "updates. Weights are rounded to nearest, ties away from zero. Not for optimizers that look at whole parameters")})
      .numbers_as_text().alias("bfloat16");
}

}  // namespace

std::vector<Key> precision_keys() {
  return {
      fp16_section(),
      bf16_section(),
      object("torch_autocast", "torch.autocast around forward; weights stay as they are",
             {boolean("enabled", false, "Use it"),
              dtype("dtype", nullptr, "Type of autocast; null: bf16"),
              texts("lower_precision_safe_modules",
                    Json::array({"torch.nn.Linear", "torch.nn.Conv1d", "torch.nn.Conv2d", "torch.nn.Conv3d"}),
                    "Gradients of all classes travel in communication_data_type, fp32 by default").accepted()}),
      object("data_types", "Types other than those of the weights",
             {dtype("grad_accum_dtype", nullptr, "Gradients are accumulated in fp32, in the shards")
                  .refuse_value("fp16", "remove it: gradients are accumulated in fp32")
                  .refuse_value("bf16", "remove it: gradients are accumulated in fp32").accepted(),
              dtype("param_dtype", nullptr, "Must agree with fp16 and bf16").accepted(),
              dtype("buffer_dtype", nullptr, "Cast module buffers to it; null: leave them"),
              texts("keep_in_fp32_modules", "auto", "Patterns of modules whose buffers stay fp32").or_word("auto")}),
  };
}

}  // namespace ds::config
