// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

#include "comm/memory.h"

namespace ds::comm {

// Torch's caching allocator on one GPU; copies run on the current stream.
class DeviceMemory : public Memory {
 public:
  explicit DeviceMemory(at::Device device) : device_(device) {}
  Device device() const override { return Device::Cuda; }
  std::shared_ptr<SymmetricBuffer> allocate(size_t bytes, const std::string& folder) override;
  void copy(void* dst, const void* src, size_t bytes) override;

 private:
  at::Device device_;
};

}  // namespace ds::comm
