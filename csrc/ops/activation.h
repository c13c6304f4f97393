// SPDX-License-Identifier: Apache-2.0
// The names of activations in the operators' schemas, and how an operator is called through torch's dispatcher.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>

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

// An operator of ours below autograd, so that whoever traces (torch.compile) sees it.
template <typename Signature>
c10::TypedOperatorHandle<Signature> find_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").template typed<Signature>();
}

}  // namespace ds::ops
