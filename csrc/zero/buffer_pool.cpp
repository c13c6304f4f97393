// SPDX-License-Identifier: Apache-2.0
#include "zero/buffer_pool.h"

#include <ATen/Functions.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include "base/checked.h"
#include "base/error.h"
#include "optim/long_lived.h"
#include "plan/reserve.h"

namespace ds::zero {

std::shared_ptr<c10::Event> event_now(at::Device device) {
  if (device.is_cpu()) return nullptr;
  auto event = std::make_shared<c10::Event>(device.type());
  event->record(c10::impl::VirtualGuardImpl(device.type()).getStream(device));
  return event;
}

BufferPool::Taken BufferPool::take_since(int64_t bytes) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    std::vector<int64_t> sizes;
    for (const Taken& t : free_) sizes.push_back(t.memory.numel());
    const int best = plan::best_free_buffer(sizes, bytes);
    if (best >= 0) {
      Taken buffer = std::move(free_[static_cast<size_t>(best)]);
      free_.erase(free_.begin() + best);
      return buffer;
    }
  }
  if (device_.is_cpu()) return {optim::host_bytes(plan::pool_buffer_bytes(bytes, /*on_host=*/true)), nullptr};
  return {at::empty({bytes}, at::TensorOptions().dtype(at::kByte).device(device_)), event_now(device_)};
}

void BufferPool::put(at::Tensor buffer) {
  std::lock_guard<std::mutex> lock(mutex_);
  free_.push_back({std::move(buffer), event_now(device_)});
}

void BufferPool::trim() {
  std::lock_guard<std::mutex> lock(mutex_);
  free_.clear();
}

int64_t BufferPool::free_bytes() const {
  std::lock_guard<std::mutex> lock(mutex_);
  int64_t total = 0;
  for (const Taken& t : free_) total += t.memory.numel();
  return total;
}

}  // namespace ds::zero
