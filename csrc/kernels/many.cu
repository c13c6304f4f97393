// SPDX-License-Identifier: Apache-2.0
#include "kernels/many.h"

#include <cstring>

#include "kernels/launch.cuh"

namespace ds::kernels {
namespace {

// Kernel parameters may take 32764 bytes from CUDA 12.1 on, 4096 before.
#if CUDART_VERSION >= 12010
constexpr int kPageBytes = 32640;
#else
constexpr int kPageBytes = 3968;
#endif
struct alignas(16) Page {
  uint4 words[kPageBytes / 16];
};

__global__ void __launch_bounds__(cuda::kThreads) write_page(const __grid_constant__ Page page, uint4* to, int words) {
  for (int i = threadIdx.x; i < words; i += cuda::kThreads) to[i] = page.words[i];
}

}  // namespace

void upload_table(const void* host, void* device, int64_t bytes, cudaStream_t stream) {
  DS_CHECK_VALUE(reinterpret_cast<uintptr_t>(device) % 16 == 0 && bytes % 16 == 0, "device: a table begins and ends at multiples of 16 bytes");
  for (int64_t begin = 0; begin < bytes; begin += kPageBytes) {
    const int64_t count = std::min<int64_t>(kPageBytes, bytes - begin);
    Page page{};
    std::memcpy(&page, static_cast<const char*>(host) + begin, static_cast<size_t>(count));
    cuda::launch("upload_table", write_page, 1, stream, page, reinterpret_cast<uint4*>(static_cast<char*>(device) + begin),
                 static_cast<int>(count / 16));
  }
}

}  // namespace ds::kernels
