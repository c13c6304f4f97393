// SPDX-License-Identifier: Apache-2.0
#include "zero/buffer_pool.h"

#include <ATen/Functions.h>

#include "base/checked.h"
#include "base/error.h"
#include "optim/long_lived.h"
#include "platform/memory.h"

namespace ds::zero {
namespace {

constexpr int64_t kHugePage = platform::kHugePageBytes;

}  // namespace

at::Tensor BufferPool::take(int64_t bytes) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    size_t best = free_.size();
    for (size_t i = 0; i < free_.size(); ++i) {
      const int64_t size = free_[i].numel();
      if (size < bytes || size > 2 * bytes + kHugePage) continue;
      if (best == free_.size() || size < free_[best].numel()) best = i;
    }
    if (best < free_.size()) {
      at::Tensor buffer = std::move(free_[best]);
      free_.erase(free_.begin() + static_cast<int64_t>(best));
      return buffer;
    }
  }
  if (device_.is_cpu()) return optim::host_bytes(round_up(bytes, bytes >= kHugePage ? kHugePage : 1));
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
