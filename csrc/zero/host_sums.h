// SPDX-License-Identifier: Apache-2.0
// Gradients of a device whose sums are taken on the host, by a thread of their own, beside backward.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <mutex>
#include <vector>

#include "optim/staging_ring.h"
#include "platform/worker.h"

namespace ds::zero {

class HostSums {
 public:
  // The contributions, now on the host, for as long as the call lasts.
  using Add = std::function<void(const void* const* srcs, int nsrc)>;

  // pinned: the memory they come down to is page-locked.
  HostSums(at::Device device, bool pinned) : device_(device), pinned_(pinned) {}

  // `bytes` bytes at each of srcs, on the device, enqueued to be copied on its current stream; then `add`, on the thread, in the order of the calls.
  // may_wait: only a few are on their way at a time; otherwise as many as there are.
  void send(const void* const* srcs, int nsrc, int64_t bytes, bool may_wait, Add add);
  // Returns when all have been added; throws what `add` has thrown, each time until drop().
  void drain() { worker_.drain(); }
  // Forgets those that have not begun to be added.
  void drop() { worker_.drop(); }

 private:
  const at::Device device_;
  const bool pinned_;
  std::mutex mutex_;
  std::vector<optim::StagingBuffer> free_;
  platform::Worker worker_;   // the last member: its tasks use the others
};

}  // namespace ds::zero
