// SPDX-License-Identifier: Apache-2.0
#include "zero/host_sums.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/from_blob.h>
#include <c10/core/DeviceGuard.h>

#include <memory>
#include <utility>

#include "plan/reserve.h"

namespace ds::zero {

void HostSums::send(const void* const* srcs, int nsrc, int64_t bytes, bool may_wait, Add add) {
  const size_t most = static_cast<size_t>(plan::gradient_buffers(bytes * nsrc));
  if (may_wait) worker_.wait_below(most);
  auto buffer = std::make_shared<optim::StagingBuffer>(device_, pinned_);
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!free_.empty()) {
      *buffer = std::move(free_.back());
      free_.pop_back();
    }
  }
  const at::Tensor memory = buffer->memory(bytes * nsrc);
  const auto options = at::TensorOptions().dtype(at::kByte).device(device_);
  for (int r = 0; r < nsrc; ++r) {
    memory.narrow(0, r * bytes, bytes).copy_(at::from_blob(const_cast<void*>(srcs[r]), {bytes}, options), /*non_blocking=*/true);
  }
  buffer->mark();
  worker_.submit([this, buffer, nsrc, bytes, most, add = std::move(add)] {
    const at::NoGradGuard no_grad;
    const c10::DeviceGuard device(device_);   // or waiting would make a context on the first one
    buffer->wait();
    const char* data = static_cast<const char*>(buffer->memory(bytes * nsrc).data_ptr());
    std::vector<const void*> here;
    for (int r = 0; r < nsrc; ++r) here.push_back(data + r * bytes);
    add(here.data(), nsrc);
    const std::lock_guard<std::mutex> lock(mutex_);
    if (free_.size() < most) free_.push_back(std::move(*buffer));
  });
}

}  // namespace ds::zero
