// SPDX-License-Identifier: Apache-2.0
// Reused memory for gathered units.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <mutex>
#include <vector>

namespace ds::zero {

// Note [Who may write a pooled buffer]
// A buffer returned by put() may still be read by kernels that were enqueued before. On a CUDA device the next writer
// is a collective, and a collective starts only after everything the issuing stream has enqueued so far; put() happens
// on that same stream, so the order holds without recording streams.
class BufferPool {
 public:
  explicit BufferPool(at::Device device) : device_(device) {}

  // A byte tensor of at least `bytes`, 64-byte aligned, contents undefined. The smallest free buffer that fits and is
  // at most twice as large, else a new one.
  at::Tensor take(int64_t bytes);
  void put(at::Tensor buffer);

  // Frees what nobody holds.
  void trim();
  int64_t free_bytes() const;

 private:
  at::Device device_;
  mutable std::mutex mutex_;
  std::vector<at::Tensor> free_;
};

}  // namespace ds::zero
