// SPDX-License-Identifier: Apache-2.0
// See cuda_runtime.h.
#pragma once

#include "base/dtype.h"

struct __half {
  uint16_t bits;
};
inline __half __ushort_as_half(uint16_t bits) { return {bits}; }
inline uint16_t __half_as_ushort(__half h) { return h.bits; }
inline float __half2float(__half h) { return ds::f16_to_float(h.bits); }
inline __half __float2half_rn(float x) { return {ds::float_to_f16(x)}; }

struct __half2 {
  __half x, y;
};
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
