# SPDX-License-Identifier: Apache-2.0
"""Softmax cross-entropy that keeps two numbers a row, and the same fused with the linear layer before it, chunk by chunk.

The fused form follows the idea of "Cut Your Losses in Large-Vocabulary Language Models" (Wijmans et al., 2024) and of the Liger kernels (Hsu
et al., 2024): the logits of all tokens, the largest tensor of a language model's training by far, never exist at once.
"""
import torch

from deepspeed.ops._library import check_dense, check_given, ops

_REDUCTIONS = {"none": 0, "sum": 1, "mean": 2}


def _reduction(name):
    if name not in _REDUCTIONS:
        raise ValueError(f"reduction must be one of {sorted(_REDUCTIONS)}, got {name!r}")
    return _REDUCTIONS[name]


class _IntoLogits(torch.autograd.Function):
    """The loss whose backward overwrites the logits with their gradient."""

    @staticmethod
    def forward(ctx, logits, labels, ignore_index, label_smoothing, z_loss):
        losses, stats = ops().cross_entropy(logits, labels, ignore_index, label_smoothing, z_loss)
        ctx.save_for_backward(logits, labels, stats)
        ctx.settings = ignore_index, label_smoothing, z_loss
        return losses

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        logits, labels, stats = ctx.saved_tensors
        gradient = logits.detach()
        ops().cross_entropy_backward_(gradient, grad, labels, stats, *ctx.settings)
        return gradient, None, None, None, None


def cross_entropy(logits, labels, ignore_index=-100, label_smoothing=0.0, reduction="mean", z_loss=0.0, inplace_backward=False):
    """Softmax cross-entropy over the last dimension.

    logits: float32, bfloat16 or float16 [..., vocabulary]. labels: int64 [...], each in [0, vocabulary) or `ignore_index`, whose rows have
        loss and gradient 0.
    label_smoothing: the share of the target that is spread evenly over the vocabulary (Szegedy et al., 2016).
    reduction: "mean" over the rows that are not ignored (NaN if there are none, as in torch; the gradients are then 0), "sum", or "none".
    z_loss: adds z_loss * logsumexp(logits)^2 to every row (PaLM, Chowdhery et al., 2022).
    inplace_backward: the gradient is written over the logits, which must be contiguous, and of which nobody may have need afterwards.

    Computed in float32, forward keeps two floats a row beside the logits themselves; the loss has the logits' dtype, like torch's.
    Raises ValueError naming the argument, and the position of a label out of range. On a GPU nothing waits to look: such a row reads nothing out of
    bounds, its loss and gradient are NaN, and the ValueError with its position comes with a later cross-entropy, forward or backward, on that device.
    """
    kind = _reduction(reduction)
    check_given(logits=logits, labels=labels)
    if logits.dim() == 0 or labels.shape != logits.shape[:-1]:
        raise ValueError(f"labels have shape {tuple(labels.shape)}, logits {tuple(logits.shape)}: expected {tuple(logits.shape[:-1])}")
    rows, targets = logits.reshape(labels.numel(), logits.shape[-1]), labels.reshape(-1)
    if inplace_backward and not logits.is_contiguous():
        raise ValueError("logits must be contiguous to be overwritten by their gradient (inplace_backward)")
    if inplace_backward and torch.is_grad_enabled() and logits.requires_grad:
        if logits.is_leaf:
            raise ValueError("logits is a leaf of the graph: its gradient cannot take its memory (inplace_backward)")
        losses = _IntoLogits.apply(rows, targets, ignore_index, label_smoothing, z_loss)
    else:
        losses, _ = ops().cross_entropy(rows, targets, ignore_index, label_smoothing, z_loss)
    if kind == _REDUCTIONS["none"]:
        return losses.reshape(labels.shape).to(logits.dtype)
    total = losses.sum()
    if kind == _REDUCTIONS["mean"]:
        total = total / (targets != ignore_index).sum()
    return total.to(logits.dtype)


def linear_cross_entropy(hidden, weight, labels, bias=None, ignore_index=-100, label_smoothing=0.0, reduction="mean", chunk_tokens=None,
                         z_loss=0.0):
    """cross_entropy(hidden @ weight.T + bias, labels) without the logits: `chunk_tokens` tokens' logits exist at a time.

    hidden: float32, bfloat16 or float16 [..., features]. weight: [vocabulary, features] of hidden's dtype (under autocast all three become its). bias: [vocabulary] of that dtype or
    float32. labels: int64 [...]. Other arguments as in cross_entropy(). The loss is float32 whatever the dtype of hidden.
    chunk_tokens: default, what 64 MiB of logits hold (256 MiB on a GPU).

    With "mean" and "sum" the gradients of hidden, weight and bias are made in the forward pass (where gradients are enabled), at the cost of
    memory of their sizes from forward to backward; backward multiplies them by the incoming gradient, unless that is 1, and can run once.
    With "none", and always in float16, whose gradients would vanish or overflow before the loss scale is known, backward computes the logits once
    more and needs hidden and weight again. A 16-bit weight's gradient is
    added up in float32.

    Under ZeRO stage 3: with "mean" and "sum", but for float16, the weight is read in forward only, so it may be freed and sharded from then on; give it
    gathered, as it is inside the forward of the module that owns it (FusedLinearCrossEntropy does), or under GatheredParameters. With
    "none" it must be gathered in backward too, which the owning module's hooks see to.
    Raises ValueError naming the argument, and the position of a label out of range; on a GPU as in cross_entropy(): NaN now, the error later.
    """
    kind = _reduction(reduction)
    check_given(hidden=hidden, weight=weight, labels=labels)
    check_dense(bias=bias)
    if hidden.dim() == 0 or labels.shape != hidden.shape[:-1]:
        raise ValueError(f"labels have shape {tuple(labels.shape)}, hidden {tuple(hidden.shape)}: expected {tuple(hidden.shape[:-1])}")
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be positive, got {chunk_tokens}")
    device = hidden.device.type
    # A matrix product, to autocast. (The meta device has none; whether a device has, torch.compile could not follow.)
    if device != "meta" and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, weight, bias = (None if t is None else t.to(dtype) for t in (hidden, weight, bias))
    rows = hidden.reshape(labels.numel(), hidden.shape[-1])
    loss = ops().linear_cross_entropy(rows, weight, bias, labels.reshape(-1), kind, ignore_index, label_smoothing, z_loss, chunk_tokens or 0)
    return loss.reshape(labels.shape) if kind == _REDUCTIONS["none"] else loss


class FusedLinearCrossEntropy(torch.nn.Module):
    """A language model's head and its loss: forward(hidden, labels) is linear_cross_entropy() with this module's weight and bias.

    weight: [vocabulary, features], initialised like torch.nn.Linear's; assign another module's weight to tie them.
    """

    def __init__(self, features, vocabulary, bias=False, ignore_index=-100, label_smoothing=0.0, reduction="mean", chunk_tokens=None, z_loss=0.0,
                 device=None, dtype=None):
        super().__init__()
        _reduction(reduction)
        linear = torch.nn.Linear(features, vocabulary, bias=bias, device=device, dtype=dtype)
        self.weight, self.bias = linear.weight, linear.bias
        self.ignore_index, self.label_smoothing, self.reduction = ignore_index, label_smoothing, reduction
        self.chunk_tokens, self.z_loss = chunk_tokens, z_loss

    def forward(self, hidden, labels):
        return linear_cross_entropy(hidden, self.weight, labels, self.bias, self.ignore_index, self.label_smoothing, self.reduction,
                                    self.chunk_tokens, self.z_loss)

    def extra_repr(self):
        vocabulary, features = self.weight.shape
        return f"features={features}, vocabulary={vocabulary}, bias={self.bias is not None}, reduction={self.reduction!r}"
