// SPDX-License-Identifier: Apache-2.0
// optimizer and scheduler, and what the built-in ones take as params. Other types are torch's; their params are torch's to check.
#include "config/schema.h"

namespace ds::config {

namespace {

const Json kBetas = Json::array({0.9, 0.999});

Key lr_row(double fallback) {
  // 0 is a legal learning rate (warm-up starts there); negative is not.
  return number("lr", fallback, "Learning rate").at_least(0);
}
Key betas_row(Json fallback) {
  return numbers("betas", std::move(fallback), "Decay of the running averages").of_length(2).at_least(0).below(1);
}
Key eps_row(double fallback) { return number("eps", fallback, "Added to the denominator").at_least(0); }
Key decay_row() { return number("weight_decay", 0.0, "Weight decay").at_least(0); }
Key amsgrad_row() {
  return boolean("amsgrad", false, "Keep the largest second moment")
      .refuse(When::True, "set it to false, or use \"torch_adam\": true");
}
Key grad_none_row() { return boolean("set_grad_none", true, "zero_grad always frees").accepted(); }
Key states_row() { return boolean("fp32_optimizer_states", true, "States are always fp32").accepted(); }

std::vector<Key> adam_rows() {
  return {lr_row(1e-3), betas_row(kBetas), eps_row(1e-8), decay_row(),
          boolean("adam_w_mode", true, "Decoupled weight decay; always so for AdamW"),
          boolean("adamw_mode", true, "Other spelling of adam_w_mode"),
          boolean("torch_adam", false, "Use torch's class and pass the rest on to it"),
          boolean("bias_correction", true, "Correct the start of the running averages"),
          amsgrad_row(), grad_none_row(), states_row()};
}

std::vector<Key> lamb_rows() {
  return {lr_row(1e-3), betas_row(kBetas), eps_row(1e-8), decay_row(),
          boolean("bias_correction", true, "Correct the start of the running averages"),
          boolean("eps_inside_sqrt", false, "eps under the root")
              .refuse(When::True, "set it to false: eps is added outside the root"),
          number("max_coeff", 10.0, "Largest trust ratio").at_least(0),
          number("min_coeff", 0.01, "Smallest trust ratio").at_least(0),
          boolean("amsgrad", false, "Not defined for LAMB").refuse(When::True, "set it to false")};
}

std::vector<Key> muon_rows() {
  return {number("lr", nullptr, "Learning rate of both halves; null: 0.02 for Muon, 3e-4 for Adam").at_least(0),
          number("muon_lr", nullptr, "Learning rate of the Muon half").at_least(0),
          number("adam_lr", nullptr, "Learning rate of the Adam half").at_least(0),
          number("momentum", 0.95, "Momentum of the Muon half").at_least(0).below(1),
          choice("ns_method", "gram", {"gram", "standard"}, "How the Newton-Schulz iteration is computed"),
          betas_row(Json::array({0.9, 0.95})), eps_row(1e-10), decay_row(),
          boolean("adam_w_mode", true, "Decoupled weight decay in the Adam half"),
          boolean("torch_adam", false, "torch's class for the Adam half").accepted(), states_row(),
          boolean("per_head_muon", false, "Orthogonalise attention heads one by one")
              .refuse(When::True, "set it to false: it is not built yet")};
}

std::vector<Key> sgd_rows() {
  return {lr_row(1e-3), number("momentum", 0.0, "Momentum").at_least(0),
          number("dampening", 0.0, "Dampening of the momentum"), decay_row(),
          boolean("nesterov", false, "Nesterov's form")};
}

std::vector<Key> adagrad_rows() {
  return {lr_row(1e-2), eps_row(1e-10), decay_row(),
          number("lr_decay", 0.0, "Decay of the learning rate").at_least(0),
          number("initial_accumulator_value", 0.0, "Start of the sum of squares").at_least(0),
          boolean("amsgrad", false, "Not defined for Adagrad").refuse(When::True, "set it to false"), states_row()};
}

Key last_iteration_row() { return integer("last_batch_iteration", -1, "Index of the last update done before").at_least(-1); }
Key warmup_steps_row() {
  return integer("warmup_num_steps", 1000, "Updates of warm-up; 0 is taken as 2").at_least(0);
}
Key warmup_type_row() { return choice("warmup_type", "log", {"log", "linear"}, "Shape of the warm-up"); }
Key total_steps_row() { return integer("total_num_steps", nullptr, "Updates in all; required").at_least(0); }

std::vector<Key> one_cycle_rows() {
  return {number_or_list("cycle_min_lr", nullptr, "Lowest learning rate, one or one per group; required").at_least(0),
          number_or_list("cycle_max_lr", nullptr, "Highest learning rate; required").at_least(0),
          integer("cycle_first_step_size", 2000, "Updates going up").above(0),
          integer("cycle_second_step_size", nullptr, "Updates going down; null: as many").at_least(0),
          integer("cycle_first_stair_count", 0, "Stairs going up; 0: smooth").at_least(0),
          integer("cycle_second_stair_count", nullptr, "Stairs going down; null: as many").at_least(0),
          integer("decay_step_size", 0, "Updates between decays afterwards; 0: no decay").at_least(0),
          number("decay_lr_rate", 0.0, "Strength of the decay"),
          boolean("cycle_momentum", true, "Move momentum the other way"),
          number("cycle_min_mom", 0.8, "Lowest momentum").at_least(0),
          number("cycle_max_mom", 0.9, "Highest momentum").at_least(0),
          number("decay_mom_rate", 0.0, "Decay of momentum afterwards"), last_iteration_row()};
}

ParamsSchema params(std::vector<std::string> types, std::vector<Key> rows, std::vector<std::string> extra = {}) {
  return {types, object("params", "", std::move(rows)), std::move(extra)};
}

}  // namespace

const std::vector<ParamsSchema>& optimizer_schemas() {
  const std::vector<std::string> torch_switches = {"foreach", "maximize", "capturable", "differentiable", "fused"};
  static const std::vector<ParamsSchema> all = {
      params({"Adam", "AdamW"}, adam_rows(), torch_switches),
      params({"Lamb"}, lamb_rows()),
      params({"Lion"}, {lr_row(1e-3), betas_row(kBetas), decay_row(), grad_none_row(), states_row()}),
      params({"Adagrad"}, adagrad_rows(), torch_switches),
      params({"Muon"}, muon_rows()),
      params({"SGD"}, sgd_rows(), torch_switches),
  };
  return all;
}

const std::vector<ParamsSchema>& scheduler_schemas() {
  static const std::vector<ParamsSchema> all = {
      params({"WarmupLR"},
             {number_or_list("warmup_min_lr", 0.0, "Learning rate at the start, one or one per group").at_least(0),
              number_or_list("warmup_max_lr", nullptr, "Learning rate afterwards; null: that of the group").at_least(0),
              warmup_steps_row(), warmup_type_row(), last_iteration_row()}),
      params({"WarmupDecayLR"},
             {total_steps_row(), number_or_list("warmup_min_lr", 0.0, "Learning rate at the start").at_least(0),
              number_or_list("warmup_max_lr", 0.001, "Learning rate after the warm-up").at_least(0),
              warmup_steps_row(), warmup_type_row(), last_iteration_row()}),
      params({"WarmupCosineLR"},
             {total_steps_row(), number("warmup_min_ratio", 0.0, "Share of the learning rate at the start").at_least(0),
              warmup_steps_row(), number("cos_min_ratio", 0.0001, "Share of the learning rate at the end").at_least(0),
              warmup_type_row(), last_iteration_row()}),
      params({"LRRangeTest"},
             {number_or_list("lr_range_test_min_lr", 1e-3, "Where the test starts").at_least(0),
              integer("lr_range_test_step_size", 2000, "Updates in a step").above(0),
              number("lr_range_test_step_rate", 1.0, "Growth in a step"),
              boolean("lr_range_test_staircase", false, "Stairs, not a slope"), last_iteration_row()}),
      params({"OneCycle"}, one_cycle_rows()),
  };
  return all;
}

std::vector<Key> optimizer_keys() {
  return {
      object("optimizer", "The optimizer, unless the caller passes one",
             {text("type", nullptr,
                   "Adam, AdamW, Adagrad, Lamb, Lion, Muon, SGD in any case, or the exact name of a torch.optim class"),
              free_form("params", Json::object(), "Handed to its constructor; those of the built-in ones are checked"),
              boolean("legacy_fusion", false, "There is one path").accepted()}),
      object("scheduler", "The learning-rate schedule, unless the caller passes one",
             {text("type", nullptr,
                   "WarmupLR, WarmupDecayLR, WarmupCosineLR, LRRangeTest, OneCycle, or a torch.optim.lr_scheduler class"),
              free_form("params", Json::object(), "Handed to its constructor; those of the built-in ones are checked")}),
  };
}

}  // namespace ds::config
