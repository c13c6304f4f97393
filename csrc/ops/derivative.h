// SPDX-License-Identifier: Apache-2.0
// What the operators' autograd functions share: how they call operators, and when the gradient they are given becomes the one they return.
//
// Note [in place]: a backward reads the gradient of its output and makes one of the same size for its input. Where nobody else holds the
// former, as a rule in a model, the operator `<name>_backward_` writes the latter into its memory: nothing is allocated, and less moves.
#pragma once

#include <ATen/MemoryOverlap.h>
#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/variable.h>

namespace ds::ops {

// An operator of ours below autograd, so that whoever traces (torch.compile) sees it.
template <typename Signature>
c10::TypedOperatorHandle<Signature> find_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").template typed<Signature>();
}

// Nobody but the caller sees t's memory, so a result may take its place: torch asks the same before it accumulates gradients in place. What
// a linear layer or a matmul hands down is a view of a tensor with other sizes: it is owned if nobody else holds that tensor either.
inline bool is_owned(const at::Tensor& t) {
  if (t.use_count() != 1 || !t.has_storage() || at::isTensorSubclassLike(t) || !t.is_non_overlapping_and_dense()) return false;
  const auto* view = torch::autograd::impl::get_view_autograd_meta(t);
  if (view == nullptr || !view->has_bw_view()) return t.storage().use_count() == 1;
  const at::Tensor& base = view->get_backward_view().base_;
  return base.use_count() == 1 && t.storage().use_count() == 2 && base.numel() == t.numel();
}

// Whether a gradient may be overwritten: it is the caller's alone (pass a reference to it: a copy counts), and no graph of the backward is
// wanted.
inline bool may_take(const at::Tensor& grad) { return !at::GradMode::is_enabled() && is_owned(grad); }

// The same for what becomes the gradient of x.
inline bool may_take(const at::Tensor& grad, const at::Tensor& x) {
  return may_take(grad) && grad.is_contiguous() && grad.scalar_type() == x.scalar_type() && grad.sizes() == x.sizes();
}

// `grad`, to be overwritten: contiguous, and it shares nothing with `others`, the contiguous tensors that are read as well.
inline at::Tensor taken(const at::Tensor& grad, const char* name, at::TensorList others) {
  TORCH_CHECK_VALUE(grad.is_contiguous(), name, " must be contiguous to be overwritten");
  for (const at::Tensor& other : others) {
    TORCH_CHECK_VALUE(!other.defined() || at::get_overlap_status(grad, other) == at::MemOverlapStatus::No, name,
                      " is to be overwritten and must not overlap another argument");
  }
  return grad;
}

}  // namespace ds::ops
