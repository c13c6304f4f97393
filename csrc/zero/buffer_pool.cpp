// SPDX-License-Identifier: Apache-2.0
#include "zero/buffer_pool.h"

#include <ATen/Functions.h>

#include "base/checked.h"
#include "base/error.h"
#include "optim/long_lived.h"
#include "plan/reserve.h"

namespace ds::zero {
at::Tensor BufferPool::take(int64_t bytes) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    std::vector<int64_t> sizes;
    for (const at::Tensor& t : free_) sizes.push_back(t.numel());
    const int best = plan::best_free_buffer(sizes, bytes);
    if (best >= 0) {
      at::Tensor buffer = std::move(free_[static_cast<size_t>(best)]);
      free_.erase(free_.begin() + best);
      return buffer;
    }
  }
  if (device_.is_cpu()) return optim::host_bytes(plan::pool_buffer_bytes(bytes, /*on_host=*/true));
  return at::empty({bytes}, at::TensorOptions().dtype(at::kByte).device(device_));
}

void BufferPool::put(at::Tensor buffer) {
  std::lock_guard<std::mutex> lock(mutex_);
  free_.push_back(std::move(buffer));
}

void BufferPool::trim() {
  std::lock_guard<std::mutex> lock(mutex_);
  free_.clear();
}

int64_t BufferPool::free_bytes() const {
  std::lock_guard<std::mutex> lock(mutex_);
  int64_t total = 0;
  for (const at::Tensor& t : free_) total += t.numel();
  return total;
}

}  // namespace ds::zero
