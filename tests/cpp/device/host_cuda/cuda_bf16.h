// SPDX-License-Identifier: Apache-2.0
// See cuda_runtime.h.
#pragma once

#include "base/dtype.h"

struct __nv_bfloat16 {
  uint16_t bits;
};
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return {ds::float_to_bf16(x)}; }
inline uint16_t __bfloat16_as_ushort(__nv_bfloat16 x) { return x.bits; }
