// SPDX-License-Identifier: Apache-2.0
#include "ops/fresh.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include "platform/memory.h"

namespace ds::ops {
namespace {

// Smaller blocks mostly are malloc's own and have been written before; and they may stay in a cache until they are read.
constexpr size_t kLargeBytes = 2 * platform::kHugePageBytes;

constexpr size_t kMemoryBytes = 16 << 20;  // two inputs and an output of it fill a last cache

bool is_large(const at::Tensor& t) { return t.device().is_cpu() && t.nbytes() >= kLargeBytes; }

at::Tensor advised(at::Tensor t) {
  if (is_large(t)) platform::advise_huge_pages(t.data_ptr(), t.nbytes());
  return t;
}

}  // namespace

at::Tensor fresh_like(const at::Tensor& t) { return fresh(t.sizes(), t.options()); }

at::Tensor fresh(at::IntArrayRef sizes, const at::TensorOptions& options) { return advised(at::empty(sizes, options)); }

bool is_past_caches(const at::Tensor& t) {
  return is_large(t) && t.nbytes() >= kLargeBytes * static_cast<size_t>(at::get_num_threads());
}

bool is_from_memory(const at::Tensor& t) { return t.device().is_cpu() && t.nbytes() >= kMemoryBytes; }

}  // namespace ds::ops
