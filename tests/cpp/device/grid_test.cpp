// SPDX-License-Identifier: Apache-2.0
// The grid finds what it is there to find.
#include <algorithm>
#include <stdexcept>

#include "arrays.h"
#include "host_cuda/cuda_runtime.h"

namespace ds::kernels::testing {
namespace {

using host_cuda::Order;

// Thread t takes what its neighbour left.
std::string shift(bool waits) {
  int left[64] = {}, taken[64] = {};
  host_cuda::run_grid(dim3(1), dim3(64), [&] {
    left[threadIdx.x] = static_cast<int>(threadIdx.x) + 1;
    if (waits) __syncthreads();
    taken[threadIdx.x] = left[(threadIdx.x + 1) % 64];
  });
  return std::string(reinterpret_cast<const char*>(taken), sizeof(taken));
}

TEST(Grid, AMissingBarrierShowsInTheBits) {
  host_cuda::set_order(Order::Ascending);
  const std::string waited = shift(true), not_waited = shift(false);
  host_cuda::set_order(Order::Descending);
  EXPECT_EQ(waited, shift(true));
  EXPECT_NE(not_waited, shift(false));
  host_cuda::set_order(Order::Ascending);
}

// The first warp leaves a value and the others take it, three times over: the second must not be left while the first is still to be taken.
TEST(Grid, AWarpThatDoesNotWaitOvertakesTheOthers) {
  const auto relay = [](bool waits) {
    int left = 0, taken[3][64] = {};
    host_cuda::run_grid(dim3(1), dim3(64), [&] {
      for (int turn = 0; turn < 3; ++turn) {
        __shfl_xor_sync(0xffffffffu, turn, 1);
        if (waits) __syncthreads();
        if (threadIdx.x == 0) left = turn + 1;
        __syncthreads();
        taken[turn][threadIdx.x] = left;
      }
    });
    int right = 0;
    for (int turn = 0; turn < 3; ++turn) right += static_cast<int>(std::count(taken[turn], taken[turn] + 64, turn + 1));
    return right;
  };
  EXPECT_EQ(relay(true), 3 * 64);
  EXPECT_LT(relay(false), 3 * 64);
}

TEST(Grid, RunsEveryThreadOfEveryBlockOnce) {
  for (Order order : {Order::Ascending, Order::Descending, Order::Random}) {
    host_cuda::set_order(order);
    int runs[5][96] = {};
    host_cuda::run_grid(dim3(5), dim3(96), [&] { ++runs[blockIdx.x][threadIdx.x]; });
    for (auto& block : runs) {
      for (int count : block) EXPECT_EQ(count, 1);
    }
  }
  host_cuda::set_order(Order::Ascending);
}

TEST(Grid, HasAtMostSoManyBlocks) {
  int runs[5] = {};
  host_cuda::limit_grid(2);
  host_cuda::run_grid(dim3(5), dim3(32), [&] {
    for (unsigned b = blockIdx.x; b < 5; b += gridDim.x) ++runs[b];
  });
  host_cuda::limit_grid(0);
  for (int count : runs) EXPECT_EQ(count, 32);
}

TEST(Grid, AWarpSumsUp) {
  int sums[64] = {};
  host_cuda::run_grid(dim3(1), dim3(64), [&] {
    int x = static_cast<int>(threadIdx.x);
    for (int apart = 16; apart > 0; apart /= 2) x += __shfl_xor_sync(0xffffffffu, x, apart);
    sums[threadIdx.x] = x;
  });
  for (int t = 0; t < 64; ++t) EXPECT_EQ(sums[t], t < 32 ? 496 : 1520);
}

TEST(Grid, ThreadsThatLeaveAreNotWaitedFor) {
  int there = 0;
  host_cuda::run_grid(dim3(1), dim3(32), [&] {
    if (threadIdx.x >= 8) return;
    __syncthreads();
    ++there;
  });
  EXPECT_EQ(there, 8);
}

std::string complaint(const std::function<void()>& body) {
  try {
    host_cuda::run_grid(dim3(1), dim3(64), body);
  } catch (const std::logic_error& e) {
    return e.what();
  }
  return "";
}

TEST(Grid, SaysWhoWaitsForWhom) {
  EXPECT_EQ(complaint([] {
              if (threadIdx.x < 16) return;
              __shfl_xor_sync(0xffffffffu, 1, 1);
            }),
            "a warp exchanges values after lanes of it have left in block 0: threads 0-15 are done; threads 16-31 wait for their warp; "
            "threads 32-63 could go on;");
  EXPECT_EQ(complaint([] {
              if (threadIdx.x == 40) __syncthreads();
              else __shfl_xor_sync(0xffffffffu, 1, 1);
              if (threadIdx.x < 32) __syncthreads();
            }),
            "no thread can go on in block 0: threads 0-31 wait for the block; threads 32-39 wait for their warp; threads 40-40 wait for the block; "
            "threads 41-63 wait for their warp;");
  EXPECT_EQ(complaint([] { __shfl_xor_sync(0xffffu, 1, 1); }).substr(0, 30), "a warp's mask leaves lanes out");
}

TEST(DeviceArray, BeginsWhereItShouldAndEndsWithItsPage) {
  for (int64_t n : {0, 1, 7, 8, 1024, 4099}) {
    for (int64_t offset : {0, 1, 3}) {
      DeviceArray x(DType::BF16, n, offset);
      EXPECT_EQ(reinterpret_cast<uintptr_t>(x.data()) % 16, static_cast<uintptr_t>(offset * 2));
      EXPECT_LT((4096 - (reinterpret_cast<uintptr_t>(x.data()) + static_cast<uintptr_t>(n) * 2) % 4096) % 4096, 16u);
      EXPECT_TRUE(x.guards_intact());
      x.as<uint16_t>()[-1] = 1;
      EXPECT_FALSE(x.guards_intact());
    }
  }
}

}  // namespace
}  // namespace ds::kernels::testing
