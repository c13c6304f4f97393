// SPDX-License-Identifier: Apache-2.0
// A few buffers of host memory that values pass through on their way to or from a device, reused in turn.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Event.h>

#include <cstdint>
#include <optional>
#include <vector>

namespace ds::optim {

class StagingRing {
 public:
  // pinned: page-locked, so that copies run beside the device's work. `device`: the other end; with the CPU copies are done when they return.
  StagingRing(at::Device device, bool pinned, int buffers);

  // The next buffer, of at least `bytes` bytes, when the copy that was marked on it is over.
  int take(int64_t bytes);
  const at::Tensor& memory(int buffer) const { return slots_.at(static_cast<size_t>(buffer)).memory; }
  // A copy has just been enqueued on the device's current stream.
  void mark(int buffer);
  // That copy is over after this.
  void wait(int buffer);

  // Enqueues dst = src, of host values to the device, in pieces: one is on its way while the next is put into a buffer.
  void send(const at::Tensor& dst, const at::Tensor& src);

  int buffers() const { return static_cast<int>(slots_.size()); }
  int64_t bytes() const;

 private:
  struct Slot {
    at::Tensor memory;   // uint8
    std::optional<c10::Event> copied;
  };
  const at::Device device_;
  const bool pinned_;
  std::vector<Slot> slots_;
  int next_ = 0;
};

}  // namespace ds::optim
