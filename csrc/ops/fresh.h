// SPDX-License-Identifier: Apache-2.0
// Outputs of operators.
#pragma once

#include <ATen/core/Tensor.h>

namespace ds::ops {

// An uninitialised contiguous tensor of t's shape, dtype and device. Large ones on the CPU are advised for huge pages (unless
// DS_HUGE_PAGES=0): the system clears a fresh page when it is first written, which for 64 MiB in small pages takes five times as long as
// an operator's whole work.
at::Tensor fresh_like(const at::Tensor& t);
at::Tensor fresh(at::IntArrayRef sizes, const at::TensorOptions& options);

// Whether a CPU kernel writes this output past the caches (kernels/output.h): from 4 MiB a thread on. With its inputs it then fills a good
// part of the last cache, which others share; a reader that comes at once finds it in memory as quickly as the writer was quicker (measured
// for softmax). Less is written to the last cache faster than to memory when several threads write.
bool is_past_caches(const at::Tensor& t);

// Whether a CPU kernel takes inputs of this size to lie in memory, not in a cache (kernels/output.h).
bool is_from_memory(const at::Tensor& t);

}  // namespace ds::ops
