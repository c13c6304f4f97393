// SPDX-License-Identifier: Apache-2.0
#include "optim/long_lived.h"

#include <ATen/Functions.h>

#include <algorithm>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <utility>

#include "base/error.h"
#include "platform/memory.h"

namespace ds::optim {

at::Tensor host_bytes(int64_t bytes) {
  auto memory = std::make_shared<platform::Buffer>(static_cast<size_t>(std::max<int64_t>(bytes, 1)));
  void* data = memory->data();
  return at::from_blob(data, {bytes}, [memory](void*) {}, at::TensorOptions().dtype(at::kByte));
}

at::Tensor long_lived_zeros(int64_t numel, at::ScalarType type, at::Device device) {
  const auto options = at::TensorOptions().dtype(type).device(device);
  const int64_t bytes = numel * static_cast<int64_t>(at::elementSize(type));
  // malloc keeps its small blocks apart from the large ones, so that only the large ones leave holes that hurt.
  if (!device.is_cpu() || bytes < static_cast<int64_t>(platform::kHugePageBytes) / 2) return at::zeros({numel}, options);
  return host_bytes(bytes).view(type);
}

at::Tensor long_lived_copy(const at::Tensor& source) {
  at::Tensor copy = long_lived_zeros(source.numel(), source.scalar_type(), source.device());
  copy.copy_(source.reshape({-1}));
  return copy;
}

void settle(const at::Tensor& t) {
  if (t.device().is_cpu() && t.is_non_overlapping_and_dense()) platform::collapse_huge_pages(t.data_ptr(), t.nbytes());
}

namespace {

// Tensors seen, by address. A weak reference tells whether the memory has been alive since: an allocator may give the address to another.
class Staying {
 public:
  // Whether t was here before and has not been freed since; true once.
  bool has_come_back(const at::Tensor& t) {
    const std::lock_guard<std::mutex> lock(mutex_);
    c10::StorageImpl* storage = t.storage().unsafeGetStorageImpl();
    const auto found = seen_.find(t.const_data_ptr());
    if (found != seen_.end() && found->second.bytes == t.nbytes() && !found->second.storage.expired() &&
        found->second.storage._unsafe_get_target() == storage) {
      return !std::exchange(found->second.has_come_back, true);
    }
    if (seen_.size() >= limit_) forget_the_dead();
    seen_.insert_or_assign(t.const_data_ptr(), Seen{t.storage().getWeakStorageImpl(), t.nbytes(), false});
    return false;
  }

 private:
  struct Seen {
    c10::weak_intrusive_ptr<c10::StorageImpl> storage;
    size_t bytes;
    bool has_come_back;
  };

  void forget_the_dead() {
    for (auto it = seen_.begin(); it != seen_.end();) it = it->second.storage.expired() ? seen_.erase(it) : std::next(it);
    limit_ = 2 * seen_.size() + 64;
  }

  std::mutex mutex_;
  std::unordered_map<const void*, Seen> seen_;
  size_t limit_ = 64;
};

}  // namespace

void settle_if_it_stays(const at::Tensor& t) {
  static auto* staying = new Staying;  // outlives every tensor
  if (!t.device().is_cpu() || t.nbytes() < 2 * platform::kHugePageBytes) return;
  if (staying->has_come_back(t)) settle(t);
}

bool discard(const at::Tensor& t) {
  DS_CHECK_VALUE(t.device().is_cpu() && t.is_non_overlapping_and_dense(), "discard: the tensor must be dense and on the host");
  return platform::discard_pages(t.data_ptr(), t.nbytes());
}

}  // namespace ds::optim
