// SPDX-License-Identifier: Apache-2.0
// The names of activations in the operators' schemas.
#pragma once

#include <ATen/core/Tensor.h>

#include <string_view>

#include "kernels/activation/activation.h"

namespace ds::ops {

inline kernels::Activation activation_named(std::string_view name) {
  if (name == "gelu") return kernels::Activation::GeluErf;
  if (name == "gelu_tanh") return kernels::Activation::GeluTanh;
  if (name == "silu") return kernels::Activation::Silu;
  if (name == "relu") return kernels::Activation::Relu;
  TORCH_CHECK_VALUE(false, "act must be gelu, gelu_tanh, silu or relu, not ", name);
}

}  // namespace ds::ops
