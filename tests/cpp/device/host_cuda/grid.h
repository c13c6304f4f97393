// SPDX-License-Identifier: Apache-2.0
// A grid of CUDA threads on one thread of the host: a block's threads are fibers, resumed one after the other up to the next place where they
// wait for each other; a warp runs on until it waits for the block, however far the others are behind. In which order is the test's choice:
// whoever forgot to wait gets other bits from another order.
#pragma once

#include <cstdint>
#include <cstring>
#include <functional>

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace host_cuda {

constexpr int kLanes = 32;

// The order in which waiting warps and their lanes go on, and blocks come: ascending, descending, or drawn anew at every turn.
enum class Order { Ascending, Descending, Random };
void set_order(Order order, uint32_t seed = 0);
// From now on a grid has at most `blocks` blocks, whatever was asked for: as if the kernel's own limit were so low. Only for kernels whose
// blocks go on with what further blocks would have done; 0 lifts the limit.
void limit_grid(unsigned blocks);

// Runs body() once for every thread. Throws std::logic_error, which says who waits where, when no thread can go on, or when a warp exchanges
// values without all of its lanes.
void run_grid(dim3 grid, dim3 block, const std::function<void()>& body);

// Of the running thread.
int lane();
void wait_for_block();
// Leaves `bits` for the warp and takes what lane `from` left, as soon as all have.
uint64_t exchange_bits(unsigned mask, uint64_t bits, int from);

template <class T>
T exchange(unsigned mask, T value, int from) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "a warp exchanges words");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(value));
  bits = exchange_bits(mask, bits, from);
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

}  // namespace host_cuda
