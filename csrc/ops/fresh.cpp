// SPDX-License-Identifier: Apache-2.0
#include "ops/fresh.h"

#include <ATen/ops/empty.h>

#include "platform/memory.h"

namespace ds::ops {
namespace {

// Smaller blocks mostly are malloc's own and have been written before.
constexpr size_t kAdvisedBytes = 2 * platform::kHugePageBytes;

at::Tensor advised(at::Tensor t) {
  if (t.device().is_cpu() && t.nbytes() >= kAdvisedBytes) platform::advise_huge_pages(t.data_ptr(), t.nbytes());
  return t;
}

}  // namespace

at::Tensor fresh_like(const at::Tensor& t) { return fresh(t.sizes(), t.options()); }

at::Tensor fresh(at::IntArrayRef sizes, const at::TensorOptions& options) { return advised(at::empty(sizes, options)); }

}  // namespace ds::ops
