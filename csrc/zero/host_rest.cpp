// SPDX-License-Identifier: Apache-2.0
#include "zero/host_rest.h"

#include <ATen/ops/from_blob.h>

#include <algorithm>

#include "optim/long_lived.h"

namespace ds::zero {

at::Tensor HostRest::zeros(int64_t numel, at::ScalarType dtype) {
  at::Tensor memory = optim::long_lived_zeros(numel, dtype, at::kCPU);
  const char* data = static_cast<const char*>(memory.data_ptr());
  if (numel == 0) return memory;
  {
    const std::lock_guard<std::mutex> lock(ranges_->mutex);
    ranges_->bytes[data] = static_cast<int64_t>(memory.nbytes());
  }
  const auto release = [memory, data, ranges = ranges_](void*) {
    const std::lock_guard<std::mutex> lock(ranges->mutex);
    ranges->bytes.erase(data);
  };
  return at::from_blob(memory.data_ptr(), {numel}, release, memory.options());
}

bool HostRest::holds(const at::Tensor& t) const {
  if (!t.defined() || !t.device().is_cpu()) return false;
  const char* data = static_cast<const char*>(t.data_ptr());
  const std::lock_guard<std::mutex> lock(ranges_->mutex);
  auto after = ranges_->bytes.upper_bound(data);
  if (after == ranges_->bytes.begin()) return false;
  const auto& [begin, bytes] = *--after;
  return data < begin + bytes;
}

void HostRest::stream(const std::vector<Job>& jobs, const Work& work) {
  std::vector<at::Tensor> tile;
  for (size_t j = 0; j < jobs.size(); ++j) {
    const int64_t numel = jobs[j].arrays.front().numel();
    const int64_t most = std::max<int64_t>(1, tile_bytes_ / 4);
    for (int64_t begin = 0; begin < numel; begin += most) {
      tile.clear();
      for (const at::Tensor& t : jobs[j].arrays) tile.push_back(t.narrow(0, begin, std::min(most, numel - begin)));
      work(j, begin, tile);
    }
  }
}

int64_t HostRest::bytes() const {
  const std::lock_guard<std::mutex> lock(ranges_->mutex);
  int64_t total = 0;
  for (const auto& [begin, bytes] : ranges_->bytes) total += bytes;
  return total;
}

}  // namespace ds::zero
