// SPDX-License-Identifier: Apache-2.0
// Looking at a run: profilers, monitors, communication log, autotuning.
#include "config/schema.h"

namespace ds::config {

namespace {

Key file_monitor(const char* name, const char* doc) {
  return object(name, doc,
      {boolean("enabled", false, "Use it"),
       text("output_path", "", "Directory; empty: the working directory"),
       text("job_name", "DeepSpeedJobName", "Directory below it")})
      .numbers_as_text();
}

Key comet_section() {
  return object("comet", "Comet, from rank 0",
      {boolean("enabled", false, "Use it"),
       integer("samples_log_interval", 100, "Samples between points").at_least(1),
       text("project", nullptr, "Project"),
       text("workspace", nullptr, "Workspace"),
       text("api_key", nullptr, "Key; better given in the environment"),
       text("experiment_name", nullptr, "Name"),
       text("experiment_key", nullptr, "Key of the experiment"),
       boolean("online", nullptr, "Send while running"),
       choice("mode", nullptr, {"get", "create", "get_or_create"}, "Which experiment")})
      .numbers_as_text();
}

Key autotuning_section() {
  return object("autotuning", "Search for a fast configuration, driven by the launcher",
      {boolean("enabled", false, "Use it").refuse(When::True, "set it to false: autotuning is not built yet"),
       boolean("fast", true, "Only stage and micro-batch").accepted(),
       text("results_dir", "autotuning_results", "Results").accepted(),
       text("exps_dir", "autotuning_exps", "Experiments").accepted(),
       boolean("overwrite", true, "Run known experiments again").accepted(),
       integer("start_profile_step", 3, "First measured update").at_least(0).accepted(),
       integer("end_profile_step", 5, "Last measured update").at_least(0).accepted(),
       choice("metric", "throughput", {"latency", "throughput", "flops", "forward", "step"}, "What counts").accepted(),
       text("metric_path", nullptr, "File of the measure").accepted(),
       text("model_info_path", nullptr, "File of the model's numbers").accepted(),
       choice("tuner_type", "gridsearch", {"gridsearch", "random", "model_based"}, "Order of trials").accepted(),
       integer("tuner_early_stopping", 5, "Trials without gain").at_least(0).accepted(),
       integer("tuner_num_trials", 50, "Trials in all").at_least(0).accepted(),
       free_form("arg_mappings", nullptr, "Config key to script option").accepted(),
       integer("max_train_batch_size", nullptr, "Largest batch").at_least(1).accepted(),
       integer("min_train_batch_size", 1, "Smallest batch").at_least(1).accepted(),
       integer("max_train_micro_batch_size_per_gpu", 1024, "Largest micro-batch").at_least(1).accepted(),
       integer("min_train_micro_batch_size_per_gpu", 1, "Smallest micro-batch").at_least(1).accepted(),
       integer("num_tuning_micro_batch_sizes", 3, "Micro-batches tried").at_least(1).accepted(),
       integer("mp_size", 1, "Ranks in one model").at_least(1).accepted(),
       object("model_info", "Numbers of the model",
              {boolean("profile", false, "Measure them").accepted(), integer("num_params", nullptr, "Parameters").accepted(),
               integer("hidden_size", nullptr, "Width").accepted(), integer("num_layers", nullptr, "Layers").accepted()}),
       any("start_step", nullptr, "Old name, without effect").ignored(),
       any("end_step", nullptr, "Old name, without effect").ignored()});
}

}  // namespace

std::vector<Key> tool_keys() {
  return {
      object("flops_profiler", "Count operations of the model",
             {boolean("enabled", false, "Use it; also measures the times of wall_clock_breakdown"),
              number("recompute_fwd_factor", 0.0, "Extra forward share when activations are recomputed").at_least(0),
              integer("profile_step", 1, "Updates done before the one that is profiled").at_least(0),
              integer("module_depth", -1, "Depth of the report; -1: all").at_least(-1),
              integer("top_modules", 1, "Modules listed a depth").at_least(0),
              boolean("detailed", true, "Print the whole tree"),
              text("output_file", nullptr, "Report goes here; null: standard output")}),
      file_monitor("tensorboard", "TensorBoard files, from rank 0"),
      file_monitor("csv_monitor", "One CSV file a measure, from rank 0"),
      object("wandb", "Weights & Biases, from rank 0",
             {boolean("enabled", false, "Use it"),
              text("project", "deepspeed", "Project"),
              text("group", nullptr, "Group"),
              text("team", nullptr, "Team")})
          .numbers_as_text(),
      comet_section(),
      object("comms_logger", "Record of every collective",
             {boolean("enabled", false, "Use it; log_summary() prints the record"),
              boolean("verbose", false, "A line for each"),
              boolean("prof_all", true, "All operations"),
              texts("prof_ops", Json::array(), "Only these, when prof_all is false"),
              boolean("debug", false, "Name the caller in those lines")})
          .numbers_as_text(),
      object("hang_detection", "When ranks wait for each other in vain: who waits for whom, then the job ends",
             {boolean("enabled", true, "Use it"),
              number("silence_s", nullptr,
                     "Seconds a collective may wait; null: four fifths of the process groups' time limit, 8 minutes of 10")
                  .above(0),
              text("flight_record", nullptr, "Folder for each rank's last collectives when the job fails; null: deepspeed_flight_record; "
                                             """: none")}),
      object("timeline", "Trace of units, collectives, step phases and memory, for Perfetto and deepspeed.telemetry.draw",
             {boolean("enabled", false, "Use it"),
              text("folder", "timeline", "Where each rank writes its trace"),
              integer("first_step", 1, "First update that is traced, counted from 0").at_least(0),
              integer("steps", 3, "Updates traced").at_least(1)}),
      autotuning_section(),
  };
}

}  // namespace ds::config
