// SPDX-License-Identifier: Apache-2.0
#include "zero/buffer_pool.h"

#include <ATen/Functions.h>
#include <sys/mman.h>

#include "base/checked.h"
#include "base/error.h"

namespace ds::zero {
namespace {

constexpr int64_t kHugePage = int64_t{2} << 20;
constexpr int64_t kPage = 4096;

// Host memory straight from the kernel: large, huge-page advised, and given back in full when freed.
at::Tensor map_host(int64_t bytes) {
  const int64_t size = round_up(bytes, bytes >= kHugePage ? kHugePage : kPage);
  void* p = ::mmap(nullptr, static_cast<size_t>(size), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  DS_CHECK(p != MAP_FAILED, "cannot allocate " << size << " bytes of host memory for a gathered unit");
  if (size >= kHugePage) ::madvise(p, static_cast<size_t>(size), MADV_HUGEPAGE);
  return at::from_blob(
      p, {size}, [size](void* q) { ::munmap(q, static_cast<size_t>(size)); }, at::TensorOptions().dtype(at::kByte));
}

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
  if (device_.is_cpu()) return map_host(std::max<int64_t>(bytes, 1));
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
