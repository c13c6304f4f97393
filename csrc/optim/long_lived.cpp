// SPDX-License-Identifier: Apache-2.0
#include "optim/long_lived.h"

#include <ATen/Functions.h>

#include <algorithm>
#include <memory>

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

bool discard(const at::Tensor& t) {
  DS_CHECK_VALUE(t.device().is_cpu() && t.is_non_overlapping_and_dense(), "discard: the tensor must be dense and on the host");
  return platform::discard_pages(t.data_ptr(), t.nbytes());
}

}  // namespace ds::optim
