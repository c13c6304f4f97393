// SPDX-License-Identifier: Apache-2.0
#include "optim/staging_ring.h"

#include <ATen/ops/empty.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <algorithm>

#include "plan/reserve.h"

namespace ds::optim {

at::Tensor StagingBuffer::memory(int64_t bytes) {
  if (!memory_.defined() || memory_.numel() < bytes) {
    memory_ = at::Tensor();   // before the larger one is there
    memory_ = at::empty({bytes}, at::TensorOptions().dtype(at::kByte).pinned_memory(pinned_));
  }
  return memory_.narrow(0, 0, bytes);
}

void StagingBuffer::mark() {
  if (device_.is_cpu()) return;
  if (!copied_) copied_.emplace(device_.type());
  copied_->record(c10::impl::VirtualGuardImpl(device_.type()).getStream(device_));
}

StagingRing::StagingRing(at::Device device, bool pinned, int buffers) {
  for (int i = 0; i < buffers; ++i) buffers_.emplace_back(device, pinned);
}

StagingBuffer& StagingRing::take() {
  StagingBuffer& buffer = buffers_[next_];
  next_ = (next_ + 1) % buffers_.size();
  buffer.wait();
  return buffer;
}

void StagingRing::send(const at::Tensor& dst, const at::Tensor& src) {
  const int64_t element = static_cast<int64_t>(src.element_size()), most = plan::kShardPieceBytes / element;
  for (int64_t begin = 0; begin < src.numel(); begin += most) {
    const int64_t numel = std::min(most, src.numel() - begin);
    StagingBuffer& buffer = take();
    const at::Tensor piece = buffer.memory(numel * element).view(src.scalar_type());
    piece.copy_(src.narrow(0, begin, numel));
    dst.narrow(0, begin, numel).copy_(piece, /*non_blocking=*/true);
    buffer.mark();
  }
}

}  // namespace ds::optim
