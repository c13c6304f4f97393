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

}  // namespace ds::ops
