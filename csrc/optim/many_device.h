// SPDX-License-Identifier: Apache-2.0
// The table of a launch over many arrays (kernels/many.h) on its way to the GPU.
#pragma once

#include <ATen/core/Tensor.h>

#include "base/error.h"

#ifdef DS_WITH_CUDA
#include <functional>

#include "ops/arguments.h"
#endif

namespace ds::optim {

// Says why a tensor that is on no device with kernels cannot be updated.
inline void require_cpu(const at::Device& device) {
  DS_CHECK(device.is_cpu(), "a tensor lies on " << device.str() << " but this build of deepspeed has no CUDA code: rebuild with nvcc on PATH");
}

#ifdef DS_WITH_CUDA
// Makes the GPU current for as long as it lives. `write` fills the table in host memory. It is copied from pinned memory, or, while a CUDA graph is
// captured, through kernel parameters: the graph then keeps the bytes, where a copy would read host memory that may belong to others by then.
class DeviceTable {
 public:
  DeviceTable(int64_t bytes, at::Device device, const std::function<void(void* host)>& write);
  const void* data() const { return table_.const_data_ptr(); }
  cudaStream_t stream() const { return gpu_.stream(); }

 private:
  at::Tensor table_;
  ops::OnGpu gpu_;
};
#endif

}  // namespace ds::optim
