// SPDX-License-Identifier: Apache-2.0
// train_batch_size = train_micro_batch_size_per_gpu x gradient_accumulation_steps x data-parallel world size.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "config/error.h"

namespace ds::config {

// How many ranks there are, how many of them work on the same samples, and who said so.
struct World {
  int64_t size = 1;
  std::string size_source = "one process";
  int64_t ranks_per_sample = 1;
  std::string ranks_per_sample_source;
};

struct Batch {
  std::optional<int64_t> train, micro, accumulation;
  int64_t data_parallel_size = 1;
};

// Completes `batch` from what is given in it. `required`: a batch that cannot be completed is a problem.
void solve_batch(Batch& batch, const World& world, bool required, Findings& findings);

}  // namespace ds::config
