// SPDX-License-Identifier: Apache-2.0
// What the tests of CUDA kernels on the host share: arrays that nobody reads or writes beyond their ends unnoticed, and every order of threads.
#pragma once

#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <new>
#include <random>
#include <string>
#include <vector>

#include "../kernels/values.h"
#include "base/dtype.h"
#include "host_cuda/grid.h"

namespace ds::kernels::testing {

// n values in a storage format. They begin `offset` elements after an address that is aligned to 16 bytes, and end where a page ends
// (at most 15 bytes before), behind which no memory is: reading there stops the test. Bytes on either side are watched for writes.
class DeviceArray : public Values {
 public:
  DeviceArray(DType dtype, int64_t n, int64_t offset = 0) : Values(dtype, n) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE)), wanted = bytes() + 16;
    inner_ = (wanted + page - 1) / page * page;
    mapped_ = inner_ + 2 * page;
    void* p = mmap(nullptr, mapped_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    pages_ = static_cast<uint8_t*>(p);
    first_ = pages_ + page;
    if (mprotect(first_, inner_, PROT_READ | PROT_WRITE) != 0) throw std::bad_alloc();
    std::memset(first_, kGuard, inner_);
    const size_t shift = static_cast<size_t>(offset) * dtype_size(dtype) % 16;
    size_t begin = (inner_ - bytes()) / 16 * 16 + shift;
    if (begin + bytes() > inner_) begin -= 16;
    data_ = first_ + begin;
    std::memset(data_, 0, bytes());
  }
  DeviceArray(DeviceArray&& other) noexcept : Values(other.dtype_, 0) { *this = std::move(other); }
  DeviceArray& operator=(DeviceArray&& other) noexcept {
    std::swap(dtype_, other.dtype_);
    std::swap(n_, other.n_);
    std::swap(inner_, other.inner_);
    std::swap(mapped_, other.mapped_);
    std::swap(pages_, other.pages_);
    std::swap(first_, other.first_);
    std::swap(data_, other.data_);
    return *this;
  }
  ~DeviceArray() override {
    if (pages_ != nullptr) munmap(pages_, mapped_);
  }

  void* data() override { return data_; }
  std::string bits() const { return std::string(reinterpret_cast<const char*>(data_), bytes()); }
  bool guards_intact() const {
    for (const uint8_t* p = first_; p < first_ + inner_; ++p) {
      if ((p < data_ || p >= data_ + bytes()) && *p != kGuard) return false;
    }
    return true;
  }

 private:
  static constexpr uint8_t kGuard = 0xa5;
  size_t inner_ = 0, mapped_ = 0;
  uint8_t *pages_ = nullptr, *first_ = nullptr, *data_ = nullptr;
};

// Runs body() with threads and blocks in one order after the other. It returns the bits of what the kernels wrote, which must be the same.
template <class Body>
void in_every_order(const Body& body) {
  using host_cuda::Order;
  std::string first;
  for (Order order : {Order::Ascending, Order::Descending, Order::Random}) {
    SCOPED_TRACE("order " + std::to_string(static_cast<int>(order)));
    host_cuda::set_order(order, 7);
    const std::string bits = body();
    if (order == Order::Ascending) first = bits;
    EXPECT_TRUE(bits == first) << "the bits depend on the order of threads";
    if (::testing::Test::HasFailure()) break;
  }
  host_cuda::set_order(Order::Ascending);
}

}  // namespace ds::kernels::testing
