// SPDX-License-Identifier: Apache-2.0
#include "optim/many_device.h"

#ifdef DS_WITH_CUDA
#include <ATen/Functions.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>

#include <vector>

#include "kernels/many.h"

namespace ds::optim {

DeviceTable::DeviceTable(int64_t bytes, at::Device device, const std::function<void(void* host)>& write)
    : table_(at::empty({bytes}, at::TensorOptions().dtype(at::kByte).device(device))), gpu_(table_) {
  if (c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None) {
    std::vector<char> host(static_cast<size_t>(bytes), 0);
    write(host.data());
    kernels::upload_table(host.data(), table_.mutable_data_ptr(), bytes, gpu_.stream());
    return;
  }
  const at::Tensor host = at::empty({bytes}, at::TensorOptions().dtype(at::kByte).pinned_memory(true));
  write(host.mutable_data_ptr());
  table_.copy_(host, /*non_blocking=*/true);  // torch keeps the pinned memory until the copy is over
}

}  // namespace ds::optim
#endif
