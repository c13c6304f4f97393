# SPDX-License-Identifier: Apache-2.0
"""Norms and clipping of lists of tensors: float64 sums whose bits do not depend on threads; on a GPU one launch for the list, nothing waits."""
import torch

from deepspeed._native import lib
from deepspeed.ops._base import has_kernels


def _gradients(parameters):
    parameters = [parameters] if torch.is_tensor(parameters) else list(parameters)
    return [p.grad for p in parameters if p.grad is not None]


def _by_device(tensors):
    groups = {}
    for t in tensors:
        groups.setdefault(t.device, []).append(t)
    return groups


def _has_gaps(tensor):
    """Whether the elements are not one piece of memory, in any order of dimensions, as the kernels need it: strided slices, expanded tensors."""
    if tensor.layout != torch.strided or tensor.is_contiguous():
        return False
    step = 1
    for stride, size in sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape) if size != 1):
        if stride != step:
            return True
        step *= size
    return False


def _stats(tensors):
    """float64 [2] on the tensors' device: sum of squares, number of elements that are not finite."""
    if has_kernels(tensors[0].device) and all(t.dtype != torch.float64 for t in tensors):
        return lib().squared_norm([t.contiguous() if _has_gaps(t) else t for t in tensors])
    squares = torch.stack([t.double().square().sum() for t in tensors]).sum()
    return torch.stack([squares, torch.stack([(~torch.isfinite(t)).sum() for t in tensors]).sum().double()])


@torch.no_grad()
def squared_norm(tensors):
    """(sum of squares of all elements, number of elements that are inf or NaN): float64 scalars on the device of the first tensor.

    `tensors`: float32, bfloat16 or float16, of any shapes, on several devices if need be; not sparse. Those with gaps
    (strided slices, expanded tensors) are copied. An empty list gives zeros on the CPU.
    """
    tensors = [t.detach() for t in tensors]
    if not tensors:
        return torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    device = tensors[0].device
    parts = [_stats(group).to(device, non_blocking=True) for group in _by_device(tensors).values()]
    total = parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)
    return total[0], total[1]


@torch.no_grad()
def grad_norm(parameters):
    """The 2-norm of the gradients of `parameters` (a tensor or an iterable) taken together: a float64 scalar."""
    return squared_norm(_gradients(parameters))[0].sqrt()


@torch.no_grad()
def clip_grad_norm_(parameters, max_norm, norm_type=2.0, error_if_nonfinite=False):
    """Scales the gradients of `parameters` in place so that their 2-norm, taken together, is at most `max_norm`; returns the norm before.

    As torch.nn.utils.clip_grad_norm_ (factor max_norm / (norm + 1e-6), at most 1; a norm that is not finite reaches the gradients), with two passes
    over the gradients, or one if the norm is small enough already. The norm is a float64 scalar on the device of the first gradient.
    """
    if float(norm_type) != 2.0:
        raise ValueError(f"norm_type: only the 2-norm is fused, got {norm_type}; use torch.nn.utils.clip_grad_norm_")
    if float(max_norm) < 0.0:
        raise ValueError(f"max_norm must not be negative, got {max_norm}")
    grads = _gradients(parameters)
    norm = squared_norm(grads)[0].sqrt()
    if error_if_nonfinite and not torch.isfinite(norm):
        raise RuntimeError(f"the norm of the gradients is {norm.item()}, so they cannot be clipped")
    factor = (float(max_norm) / (norm + 1e-6)).clamp(max=1.0)
    for device, group in _by_device(grads).items():
        local = factor.to(device, non_blocking=True)
        if has_kernels(device) and all(g.dtype != torch.float64 for g in group):
            in_pieces = [(g, g.contiguous()) for g in group if _has_gaps(g)]
            lib().scale_tensors([g for g in group if not _has_gaps(g)] + [copy for _, copy in in_pieces], local)
            for g, copy in in_pieces:
                g.copy_(copy)
        else:
            for g in group:
                g.mul_(local.to(g.dtype))
    return norm
