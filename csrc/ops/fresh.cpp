// SPDX-License-Identifier: Apache-2.0
#include "ops/fresh.h"

#include <ATen/ops/empty.h>
#include <sys/mman.h>

#include "platform/env.h"
#include "platform/memory.h"

namespace ds::ops {
namespace {

// Smaller blocks mostly are malloc's own and have been written before.
constexpr size_t kAdvisedBytes = 2 * platform::kHugePageBytes;

at::Tensor advised(at::Tensor t) {
  static const bool wanted = *platform::env_bool("DS_HUGE_PAGES");
  if (!wanted || !t.device().is_cpu() || t.nbytes() < kAdvisedBytes) return t;
  // Only whole huge pages inside the block, so that no neighbour in the heap is touched. Advice: a refusal changes nothing.
  constexpr uintptr_t kPage = platform::kHugePageBytes;
  const auto begin = (reinterpret_cast<uintptr_t>(t.data_ptr()) + kPage - 1) / kPage * kPage;
  const auto end = (reinterpret_cast<uintptr_t>(t.data_ptr()) + t.nbytes()) / kPage * kPage;
  if (begin < end) ::madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
  return t;
}

}  // namespace

at::Tensor fresh_like(const at::Tensor& t) { return fresh(t.sizes(), t.options()); }

at::Tensor fresh(at::IntArrayRef sizes, const at::TensorOptions& options) { return advised(at::empty(sizes, options)); }

}  // namespace ds::ops
