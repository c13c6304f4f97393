// SPDX-License-Identifier: Apache-2.0
#include "zero/host_rest.h"

#include <ATen/ops/from_blob.h>

#include <algorithm>

#include "base/checked.h"
#include "base/error.h"
#include "optim/long_lived.h"
#include "platform/memory.h"

namespace ds::zero {
namespace {

// Whole pages of one kind, so that the pages of two such can change places.
int64_t exchangeable_bytes(int64_t bytes) {
  const auto huge = static_cast<int64_t>(platform::kHugePageBytes);
  return round_up(bytes, bytes >= huge ? huge : static_cast<int64_t>(platform::kPageBytes));
}

}  // namespace

at::Tensor HostRest::zeros(int64_t numel, at::ScalarType dtype, bool second_place) {
  const int64_t bytes = numel * static_cast<int64_t>(c10::elementSize(dtype));
  at::Tensor memory, second;
  if (second_place && second_places_ && numel > 0) {
    memory = optim::host_bytes(exchangeable_bytes(bytes));
    second = optim::host_bytes(exchangeable_bytes(bytes));
  } else {
    memory = optim::long_lived_zeros(numel, dtype, at::kCPU);
  }
  if (numel == 0) return memory;
  const char* data = static_cast<const char*>(memory.data_ptr());
  {
    const std::lock_guard<std::mutex> lock(ranges_->mutex);
    ranges_->by_address[data] = {data, static_cast<int64_t>(memory.nbytes()), second.defined() ? static_cast<char*>(second.data_ptr()) : nullptr};
  }
  const auto release = [memory, second, data, ranges = ranges_](void*) {
    const std::lock_guard<std::mutex> lock(ranges->mutex);
    ranges->by_address.erase(data);
  };
  return at::from_blob(memory.data_ptr(), {numel}, release, at::TensorOptions().dtype(dtype));
}

std::optional<HostRest::Range> HostRest::find(const void* address) const {
  const char* data = static_cast<const char*>(address);
  const std::lock_guard<std::mutex> lock(ranges_->mutex);
  auto after = ranges_->by_address.upper_bound(data);
  if (after == ranges_->by_address.begin()) return std::nullopt;
  const Range& range = (--after)->second;
  return data < range.begin + range.bytes ? std::optional(range) : std::nullopt;
}

// Of the same elements; undefined when the array has none.
at::Tensor HostRest::second_place_of(const at::Tensor& t) const {
  const auto range = find(t.data_ptr());
  if (!range || range->second == nullptr) return {};
  return at::from_blob(range->second + (static_cast<const char*>(t.data_ptr()) - range->begin), t.sizes(), t.options());
}

void HostRest::exchange(const at::Tensor& whole) {
  const auto range = find(whole.data_ptr());
  DS_CHECK(range && range->second != nullptr && range->begin == whole.data_ptr(), "exchange: not an array with a second place");
  platform::exchange_pages(whole.data_ptr(), range->second, static_cast<size_t>(range->bytes));
}

void HostRest::stream(const std::vector<Job>& jobs, const Work& work, Into into) {
  std::vector<at::Tensor> tile;
  for (size_t j = 0; j < jobs.size(); ++j) {
    const int64_t numel = jobs[j].arrays.front().numel();
    const int64_t most = std::max<int64_t>(1, tile_bytes_ / 4);
    for (int64_t begin = 0; begin < numel; begin += most) {
      tile.clear();
      for (size_t i = 0; i < jobs[j].arrays.size(); ++i) {
        at::Tensor part = jobs[j].arrays[i].narrow(0, begin, std::min(most, numel - begin));
        if (into == Into::Second && jobs[j].write[i]) {
          const at::Tensor second = second_place_of(part);
          DS_CHECK(second.defined(), "an array to stream into its second place has none");
          part = second.copy_(part);
        }
        tile.push_back(part);
      }
      work(j, begin, tile);
    }
  }
}

int64_t HostRest::bytes() const {
  const std::lock_guard<std::mutex> lock(ranges_->mutex);
  int64_t total = 0;
  for (const auto& [begin, range] : ranges_->by_address) total += range.second != nullptr ? 2 * range.bytes : range.bytes;
  return total;
}

}  // namespace ds::zero
