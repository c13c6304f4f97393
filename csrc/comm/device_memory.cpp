// SPDX-License-Identifier: Apache-2.0
#include "comm/device_memory.h"

#include <ATen/ops/zeros.h>

#include "comm/c10d_transport.h"

namespace ds::comm {
namespace {

class DeviceBuffer : public SymmetricBuffer {
 public:
  explicit DeviceBuffer(at::Tensor memory)
      : SymmetricBuffer(memory.data_ptr(), memory.nbytes(), Device::Cuda, memory.device().index()), memory_(std::move(memory)) {}

 private:
  at::Tensor memory_;
};

}  // namespace

std::shared_ptr<SymmetricBuffer> DeviceMemory::allocate(size_t bytes, const std::string& folder) {
  DS_CHECK_VALUE(folder.empty(), "device memory cannot rest in a file of " << folder);
  return std::make_shared<DeviceBuffer>(
      at::zeros({static_cast<int64_t>(bytes)}, at::TensorOptions().dtype(at::kByte).device(device_)));
}

void DeviceMemory::copy(void* dst, const void* src, size_t bytes) {
  if (bytes == 0) return;
  byte_view(dst, bytes, device_, nullptr).copy_(byte_view(const_cast<void*>(src), bytes, device_, nullptr), /*non_blocking=*/true);
}

at::Tensor SymmetricBuffer::tensor() {
  const at::Device where = device_ == Device::Cpu ? at::Device(at::kCPU) : at::Device(at::kCUDA, device_index_);
  return byte_view(data_, bytes_, where, shared_from_this());
}

}  // namespace ds::comm
