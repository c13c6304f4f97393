// SPDX-License-Identifier: Apache-2.0
// Batch sizes, communication and reports: the keys that stand at the top level by themselves.
#include "config/schema.h"

namespace ds::config {

namespace {

std::vector<Key> batch_rows() {
  return {
      integer("train_batch_size", nullptr, "Samples in one optimizer update, over all data-parallel ranks").at_least(1),
      integer("train_micro_batch_size_per_gpu", nullptr, "Samples in one forward and backward on one rank").at_least(1),
      integer("gradient_accumulation_steps", nullptr, "Forward/backward passes in one update; each loss is divided by it")
          .at_least(1),
      boolean("managed_gradient_accumulation", true, "Whether the engine counts micro-steps; false: every step() updates"),
      boolean("dataloader_drop_last", false, "Drop the last, smaller batch of the built-in data loader"),
  };
}

std::vector<Key> communication_rows() {
  return {
      number("gradient_clipping", 1.0, "Largest allowed global norm of the gradients; 0 turns clipping off").at_least(0),
      boolean("prescale_gradients", false, "Divide gradients by the number of ranks before the reduction, not after"),
      number("gradient_predivide_factor", 1.0, "Part of the division done before the reduction; see prescale_gradients")
          .above(0),
      choice("gradient_allreduce_op", "mean", {"mean", "sum"}, "Average the ranks' gradients or add them; sum not with stage 3")
          .ignoring_case(),
      dtype("communication_data_type", nullptr, "Type in which gradients travel; null: that of the gradients"),
      dtype("seq_parallel_communication_data_type", "fp32", "The same when sequences are split over ranks").accepted(),
      boolean("disable_allgather", false, "Read by nothing").accepted(),
      boolean("use_data_before_expert_parallelism", false, "Order of ranks in expert groups").accepted(),
      integer("sequence_parallel_size", nullptr, "Ranks that share one sequence; divides the world size in the batch equation")
          .at_least(1),
      integer("data_parallel_size", nullptr, "With sequence_parallel_size: the product must be the world size").at_least(1),
  };
}

std::vector<Key> report_rows() {
  return {
      number("steps_per_print", nullptr, "A progress line every so many updates; null or Infinity: never")
          .at_least(1).or_infinite(),
      boolean("wall_clock_breakdown", false, "Time forward, backward and step"),
      boolean("memory_breakdown", false, "Report memory at the phases of a step"),
      boolean("dump_state", false, "Print the engine's settings on rank 0 after initialize"),
      boolean("disable_python_gc", false, "Suspend Python's cyclic garbage collector after initialize"),
      choice("log_level", nullptr, {"debug", "info", "warning", "error", "critical"}, "Level of the DeepSpeed logger")
          .ignoring_case(),
      integer("vocabulary_size", nullptr, "Only looked at by people").accepted(),
      object("timers", "Built-in timers",
             {object("throughput", "Samples per second",
                     {boolean("enabled", true, "Measure it"),
                      boolean("synchronized", true, "Wait for the device around the measurement")})
                  .numbers_as_text()}),
      boolean("strict", false, "Unknown and unused keys are errors everywhere, also at the top level"),
  };
}

}  // namespace

std::vector<Key> general_keys() {
  std::vector<Key> keys = batch_rows(), communication = communication_rows(), report = report_rows();
  for (Key& key : communication) keys.push_back(std::move(key));
  for (Key& key : report) keys.push_back(std::move(key));
  for (const char* name : {"comms_config", "monitor_config", "fp8", "msamp", "session_params", "allgather_size"}) {
    keys.push_back(any(name, nullptr, "Found in old files; read by nothing").ignored());
  }
  keys.push_back(any("inference", nullptr, "Read by other libraries from the same file").accepted());
  return keys;
}

}  // namespace ds::config
