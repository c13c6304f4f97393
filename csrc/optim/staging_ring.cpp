// SPDX-License-Identifier: Apache-2.0
#include "optim/staging_ring.h"

#include <ATen/ops/empty.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <algorithm>

namespace ds::optim {

StagingRing::StagingRing(at::Device device, bool pinned, int buffers)
    : device_(device), pinned_(pinned && !device.is_cpu()), slots_(static_cast<size_t>(buffers)) {}

int StagingRing::take(int64_t bytes) {
  const int buffer = next_;
  next_ = (next_ + 1) % buffers();
  wait(buffer);
  at::Tensor& memory = slots_[static_cast<size_t>(buffer)].memory;
  if (!memory.defined() || memory.numel() < bytes) {
    memory = at::Tensor();   // before the larger one is there
    memory = at::empty({bytes}, at::TensorOptions().dtype(at::kByte).pinned_memory(pinned_));
  }
  return buffer;
}

void StagingRing::mark(int buffer) {
  if (device_.is_cpu()) return;
  auto& copied = slots_.at(static_cast<size_t>(buffer)).copied;
  if (!copied) copied.emplace(device_.type());
  copied->record(c10::impl::VirtualGuardImpl(device_.type()).getStream(device_));
}

void StagingRing::wait(int buffer) {
  auto& copied = slots_.at(static_cast<size_t>(buffer)).copied;
  if (copied) copied->synchronize();
}

void StagingRing::send(const at::Tensor& dst, const at::Tensor& src) {
  constexpr int64_t kPieceBytes = int64_t{16} << 20;
  const int64_t element = static_cast<int64_t>(src.element_size()), most = kPieceBytes / element;
  for (int64_t begin = 0; begin < src.numel(); begin += most) {
    const int64_t numel = std::min(most, src.numel() - begin);
    const int buffer = take(numel * element);
    const at::Tensor piece = memory(buffer).narrow(0, 0, numel * element).view(src.scalar_type());
    piece.copy_(src.narrow(0, begin, numel));
    dst.narrow(0, begin, numel).copy_(piece, /*non_blocking=*/true);
    mark(buffer);
  }
}

int64_t StagingRing::bytes() const {
  int64_t total = 0;
  for (const Slot& slot : slots_) {
    if (slot.memory.defined()) total += slot.memory.numel();
  }
  return total;
}

}  // namespace ds::optim
