// SPDX-License-Identifier: Apache-2.0
// From a run-time DType to a compile-time tag, and the argument checks every kernel makes.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "base/dtype.h"
#include "base/error.h"

namespace ds::kernels {

// A storage format of float32 values: Raw is what lies in memory.
struct F32 {
  using Raw = float;
  static float load(Raw x) { return x; }
  static Raw store(float x) { return x; }
};
struct BF16 {
  using Raw = uint16_t;
  static float load(Raw x) { return bf16_to_float(x); }
  static Raw store(float x) { return float_to_bf16(x); }
};
struct F16 {
  using Raw = uint16_t;
  static float load(Raw x) { return f16_to_float(x); }
  static Raw store(float x) { return float_to_f16(x); }
};
// The output that is not wanted.
struct None {
  using Raw = uint8_t;
};

// Calls f with the tag of `t`; `name` is the argument the message blames.
template <typename F>
void dispatch_float(DType t, const char* name, F&& f) {
  switch (t) {
    case DType::F32: return f(F32{});
    case DType::BF16: return f(BF16{});
    case DType::F16: return f(F16{});
    default: DS_FAIL_VALUE(name << ": dtype must be F32, F16 or BF16, not " << dtype_name(t));
  }
}

// As dispatch_float, with tag None for a null pointer.
template <typename F>
void dispatch_optional(const void* pointer, DType t, const char* name, F&& f) {
  if (pointer == nullptr) return f(None{});
  dispatch_float(t, name, f);
}

// A size and the arrays of that many elements: negative sizes and null arrays (of a positive size) are refused by name.
struct NamedArray {
  const void* pointer;
  const char* name;
};
inline void check_arrays(int64_t n, std::initializer_list<NamedArray> arrays) {
  DS_CHECK_VALUE(n >= 0, "n must not be negative, got " << n);
  if (n == 0) return;
  for (const NamedArray& a : arrays) DS_CHECK_VALUE(a.pointer != nullptr, a.name << " is null");
}

}  // namespace ds::kernels
