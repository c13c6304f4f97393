// SPDX-License-Identifier: Apache-2.0
// What the kernel tests share: awkward sizes, misaligned arrays, every instruction set of the machine.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "base/dtype.h"
#include "kernels/simd_targets.h"
#include "hwy/highway.h"
#include "values.h"

namespace ds::kernels::testing {

// Around every vector length (4, 8, 16 floats), the 16 statistics lanes and pairs of vectors.
inline std::vector<int64_t> sizes() {
  std::vector<int64_t> all = {0, 1, 2, 3};
  for (int64_t lanes : {4, 8, 16, 32}) {
    for (int64_t n : {lanes - 1, lanes, lanes + 1, 8 * lanes + 2}) all.push_back(n);
  }
  all.push_back(4099);
  return all;
}

// n values in a storage format, beginning `offset` elements after an aligned address, with guards on both sides.
class Array : public Values {
 public:
  Array(DType dtype, int64_t n, int64_t offset = 0) : Values(dtype, n) {
    const int64_t begin = 64 + offset;
    bytes_.assign((begin + n + 64) * dtype_size(dtype) + 64, kGuard);
    const auto base = reinterpret_cast<uintptr_t>(bytes_.data());
    begin_ = (64 - base % 64) % 64 + begin * dtype_size(dtype);
    for (int64_t i = 0; i < n; ++i) set(i, 0.0f);
  }
  void* data() override { return bytes_.data() + begin_; }
  bool guards_intact() const {
    const size_t end = begin_ + bytes();
    for (size_t i = 0; i < bytes_.size(); ++i) {
      if ((i < begin_ || i >= end) && bytes_[i] != kGuard) return false;
    }
    return true;
  }

 private:
  static constexpr uint8_t kGuard = 0xa5;
  size_t begin_;
  std::vector<uint8_t> bytes_;
};

// Runs body(n, offset) for every instruction set, size and misalignment.
template <typename Body>
void for_every_slice(const Body& body) {
  for (int64_t target : hwy::SupportedAndGeneratedTargets()) {
    hwy::SetSupportedTargetsForTest(target);
    hwy::GetChosenTarget().Update(hwy::SupportedTargets());
    for (int64_t n : sizes()) {
      for (int64_t offset : {0, 1, 3}) {
        SCOPED_TRACE(std::string(hwy::TargetName(target)) + " n=" + std::to_string(n) + " offset=" + std::to_string(offset));
        body(n, offset);
        if (::testing::Test::HasFailure()) break;
      }
    }
  }
  hwy::SetSupportedTargetsForTest(0);
  hwy::GetChosenTarget().Update(hwy::SupportedTargets());
}

}  // namespace ds::kernels::testing
