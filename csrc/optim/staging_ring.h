// SPDX-License-Identifier: Apache-2.0
// Host memory that values pass through on their way to or from a device, used again and again.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Event.h>

#include <cstdint>
#include <optional>
#include <vector>

namespace ds::optim {

// One buffer and the copy that was last enqueued with it.
class StagingBuffer {
 public:
  // pinned: page-locked, so that copies run beside the device's work. `device`: the other end; with the CPU copies are done when they return.
  StagingBuffer(at::Device device, bool pinned) : device_(device), pinned_(pinned && !device.is_cpu()) {}

  // `bytes` bytes of it as uint8; made larger when it must be. The copy is over (wait()).
  at::Tensor memory(int64_t bytes);
  // A copy has just been enqueued on the device's current stream.
  void mark();
  bool done() const { return !copied_ || copied_->query(); }
  void wait() const {
    if (copied_) copied_->synchronize();
  }
  int64_t bytes() const { return memory_.defined() ? memory_.numel() : 0; }

 private:
  at::Device device_;
  bool pinned_;
  at::Tensor memory_;
  std::optional<c10::Event> copied_;
};

// A few of them in turn, for values on their way to a device.
class StagingRing {
 public:
  StagingRing(at::Device device, bool pinned, int buffers);

  // The next buffer, when its last copy is over.
  StagingBuffer& take();
  // Enqueues dst = src, of host values to the device, in pieces: one is on its way while the next is put into a buffer.
  void send(const at::Tensor& dst, const at::Tensor& src);

 private:
  std::vector<StagingBuffer> buffers_;
  size_t next_ = 0;
};

}  // namespace ds::optim
