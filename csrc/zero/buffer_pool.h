// SPDX-License-Identifier: Apache-2.0
// Reused memory for gathered units.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Event.h>

#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

namespace ds::zero {

// What has been enqueued on the device's current stream so far; null for the CPU, where work is done when it returns.
std::shared_ptr<c10::Event> event_now(at::Device device);

// Note [Who may write a pooled buffer]
// A buffer returned by put() may still be read by kernels that were enqueued before. On a CUDA device the next writer
// is a collective, and a collective starts only after everything the issuing stream has enqueued so far; put() happens
// on that same stream, so the order holds without recording streams. A writer on another stream waits for `since` instead: what was
// enqueued when the buffer was put back, or made, and nothing later.
class BufferPool {
 public:
  struct Taken {
    at::Tensor memory;
    std::shared_ptr<c10::Event> since;   // null on the CPU
  };

  explicit BufferPool(at::Device device) : device_(device) {}

  // A byte tensor of at least `bytes`, 64-byte aligned, contents undefined. The smallest free buffer that fits and is
  // at most twice as large, else a new one.
  at::Tensor take(int64_t bytes) { return take_since(bytes).memory; }
  Taken take_since(int64_t bytes);
  void put(at::Tensor buffer);

  // Frees what nobody holds.
  void trim();
  int64_t free_bytes() const;

 private:
  at::Device device_;
  mutable std::mutex mutex_;
  std::vector<Taken> free_;
};

}  // namespace ds::zero
