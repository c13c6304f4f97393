// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

#include "ops/arguments.h"

namespace ds::ops {

// A weight or bias as the CPU kernels read it: float32, contiguous, plus `offset`; undefined if it is. It is short and read once a row.
inline at::Tensor float_vector(const at::Tensor& t, double offset = 0.0) {
  if (!t.defined()) return t;
  const at::Tensor wide = t.to(at::kFloat).contiguous();
  return offset == 0.0 ? wide : wide.add(offset);
}

inline const float* floats(const at::Tensor& t) { return static_cast<const float*>(data(t)); }

}  // namespace ds::ops
