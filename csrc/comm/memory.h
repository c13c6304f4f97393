// SPDX-License-Identifier: Apache-2.0
// Where a transport's local buffers live and how bytes are copied there. Host memory here; device memory in device.h.
#pragma once

#include <memory>
#include <string>

#include "comm/transport.h"

namespace ds::comm {

class Memory {
 public:
  virtual ~Memory() = default;
  virtual Device device() const = 0;
  virtual std::shared_ptr<SymmetricBuffer> allocate(size_t bytes, const std::string& folder) = 0;   // zero-filled
  virtual void copy(void* dst, const void* src, size_t bytes) = 0;                 // CUDA: on the current stream
};

class HostMemory : public Memory {
 public:
  Device device() const override { return Device::Cpu; }
  std::shared_ptr<SymmetricBuffer> allocate(size_t bytes, const std::string& folder) override;
  void copy(void* dst, const void* src, size_t bytes) override;
};

// Memory of the caller's as a buffer that c10d's carriers and the local one can gather from; those that share memory cannot. `owner` keeps it.
std::shared_ptr<SymmetricBuffer> borrow(void* data, size_t bytes, Device device, int device_index, std::shared_ptr<void> owner);

}  // namespace ds::comm
