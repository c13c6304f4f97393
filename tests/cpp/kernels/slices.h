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

inline constexpr DType kFloats[] = {DType::F32, DType::BF16, DType::F16};

// n values in a storage format, beginning `offset` elements after an aligned address, with guards on both sides.
class Array {
 public:
  Array(DType dtype, int64_t n, int64_t offset = 0) : dtype_(dtype), n_(n) {
    const int64_t begin = 64 + offset;
    bytes_.assign((begin + n + 64) * dtype_size(dtype) + 64, kGuard);
    const auto base = reinterpret_cast<uintptr_t>(bytes_.data());
    begin_ = (64 - base % 64) % 64 + begin * dtype_size(dtype);
    for (int64_t i = 0; i < n; ++i) set(i, 0.0f);
  }
  void* data() { return bytes_.data() + begin_; }
  float* floats() { return static_cast<float*>(data()); }
  DType dtype() const { return dtype_; }
  float get(int64_t i) {
    if (dtype_ == DType::F32) return floats()[i];
    const uint16_t raw = static_cast<uint16_t*>(data())[i];
    return dtype_ == DType::BF16 ? bf16_to_float(raw) : f16_to_float(raw);
  }
  void set(int64_t i, float x) {
    if (dtype_ == DType::F32) floats()[i] = x;
    else static_cast<uint16_t*>(data())[i] = dtype_ == DType::BF16 ? float_to_bf16(x) : float_to_f16(x);
  }
  void fill(unsigned seed, float low = -2.0f, float high = 2.0f) {
    std::mt19937 generator(seed);
    std::uniform_real_distribution<float> value(low, high);
    for (int64_t i = 0; i < n_; ++i) set(i, value(generator));
  }
  void copy(Array& other) { std::memcpy(data(), other.data(), n_ * dtype_size(dtype_)); }
  bool same_bits(Array& other) { return std::memcmp(data(), other.data(), n_ * dtype_size(dtype_)) == 0; }
  bool guards_intact() const {
    const size_t end = begin_ + n_ * dtype_size(dtype_);
    for (size_t i = 0; i < bytes_.size(); ++i) {
      if ((i < begin_ || i >= end) && bytes_[i] != kGuard) return false;
    }
    return true;
  }

 private:
  static constexpr uint8_t kGuard = 0xa5;
  DType dtype_;
  int64_t n_;
  size_t begin_;
  std::vector<uint8_t> bytes_;
};

#define EXPECT_SAME(a, b) EXPECT_TRUE((a).same_bits(b) && (a).guards_intact()) << #a

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
