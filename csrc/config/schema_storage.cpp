// SPDX-License-Identifier: Apache-2.0
// Activations kept for backward, files, checkpoints.
#include "config/schema.h"

namespace ds::config {

std::vector<Key> storage_keys() {
  return {
      object("activation_checkpointing", "What deepspeed.checkpointing.configure(mpu, config) reads; docs/activation_checkpointing.md",
             {boolean("partition_activations", false, "Each model-parallel rank keeps its part of the saved inputs; gathered in backward"),
              boolean("cpu_checkpointing", false, "Saved inputs rest in pinned host memory; without effect where the host is the device"),
              boolean("contiguous_memory_optimization", false, "They rest in buffers made once; needs partition_activations and "
                                                               "number_checkpoints"),
              integer("number_checkpoints", nullptr, "Checkpointed calls in a pass, which those buffers are made for").at_least(1),
              boolean("synchronize_checkpoint_boundary", false, "Wait for the device at the ends of each checkpointed call"),
              boolean("profile", false, "Log the time of each")}),
      object("aio", "Asynchronous file access",
             {integer("block_size", 1048576, "Bytes in a request").at_least(512).accepted(),
              integer("queue_depth", 8, "Requests in flight").at_least(1).accepted(),
              integer("intra_op_parallelism", 1, "Threads for one request").at_least(1).accepted(),
              any("thread_count", nullptr, "Old name of intra_op_parallelism, without effect").ignored(),
              boolean("single_submit", false, "One request a system call").accepted(),
              boolean("overlap_events", true, "Submit while completing").accepted(),
              boolean("use_gds", false, "GPUDirect storage")
                  .refuse(When::True, "set it to false: GPUDirect storage is not built yet")}),
      object("checkpoint", "Saving and loading",
             {choice("tag_validation", "Warn", {"Ignore", "Warn", "Fail"}, "When ranks save under different tags")
                  .ignoring_case(),
              boolean("load_universal", false, "The file latest_universal counts before latest; any checkpoint can be loaded by any "
                                               "number of ranks without it"),
              boolean("use_node_local_storage", false, "Without effect on one node; a save on several is refused, since their files "
                                                       "could not be loaded"),
              integer("keep_last", 0, "Checkpoints that stay in a folder; older ones are removed after a save. 0: all").at_least(0),
              object("parallel_write", "Who writes",
                     {boolean("pipeline_stage", false, "Without effect: data-parallel ranks always share the writing").strict_bool().accepted()}),
              boolean("checkpoint_serialization", true, "Without effect: nothing is written by torch.save").accepted(),
              object("writer", "How bytes reach the disk; never changes what is written",
                     {choice("type", "fast", {"mock", "python", "fast"}, "Without effect: there is one writer, which is fast").ignoring_case()
                          .accepted(),
                      boolean("decoupled", false, "Training goes on while a copy of the state is written; errors show at a later step, "
                                                  "save or load"),
                      integer("io_buffer_size", 67108864, "Without effect: a writer holds 24 blocks of 1 MiB, and none in a file system in "
                                                          "memory").at_least(1).accepted(),
                      boolean("io_buffer_double", true, "Without effect: blocks are filled while others are written").accepted(),
                      integer("io_multiplier", 1, "Threads, each with a file of its own, that a rank saves with; left out: as many as it "
                                                  "has cores to itself, at most 4. With `decoupled` it is one").at_least(1),
                      boolean("show_statistics", false, "Log bytes and speed of each save"),
                      choice("data_parallel", nullptr, {"replica", "socket", "machine"}, "Without effect: all ranks that hold a value share the "
                                                                                "writing of it").ignoring_case()
                          .accepted()})}),
      any("datastates_ckpt", nullptr, "Settings of another checkpoint engine; ours is used").ignored(),
  };
}

}  // namespace ds::config
