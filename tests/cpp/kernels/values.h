// SPDX-License-Identifier: Apache-2.0
// Values in a storage format, as the tests of the kernels of both devices write and read them.
#pragma once

#include <gtest/gtest.h>

#include <cstring>
#include <random>

#include "base/dtype.h"

namespace ds::kernels::testing {

inline constexpr DType kFloats[] = {DType::F32, DType::BF16, DType::F16};

// n values; where they lie and what guards them is the subclass's.
class Values {
 public:
  virtual ~Values() = default;
  virtual void* data() = 0;
  template <class T>
  T* as() {
    return static_cast<T*>(data());
  }
  float* floats() { return as<float>(); }
  DType dtype() const { return dtype_; }
  int64_t size() const { return n_; }
  float get(int64_t i) {
    if (dtype_ == DType::F32) return floats()[i];
    const uint16_t raw = as<uint16_t>()[i];
    return dtype_ == DType::BF16 ? bf16_to_float(raw) : f16_to_float(raw);
  }
  void set(int64_t i, float x) {
    if (dtype_ == DType::F32) floats()[i] = x;
    else as<uint16_t>()[i] = dtype_ == DType::BF16 ? float_to_bf16(x) : float_to_f16(x);
  }
  void fill(unsigned seed, float low = -2.0f, float high = 2.0f) {
    std::mt19937 generator(seed);
    std::uniform_real_distribution<float> value(low, high);
    for (int64_t i = 0; i < n_; ++i) set(i, value(generator));
  }
  void copy(Values& other) { std::memcpy(data(), other.data(), bytes()); }
  bool same_bits(Values& other) { return std::memcmp(data(), other.data(), bytes()) == 0; }

 protected:
  Values(DType dtype, int64_t n) : dtype_(dtype), n_(n) {}
  size_t bytes() const { return static_cast<size_t>(n_) * dtype_size(dtype_); }
  DType dtype_;
  int64_t n_;
};

#define EXPECT_SAME(a, b) EXPECT_TRUE((a).same_bits(b) && (a).guards_intact()) << #a

}  // namespace ds::kernels::testing
