# SPDX-License-Identifier: Apache-2.0
"""Norms over lists of tensors that may be split over model parallel ranks, and clipping by them.

Note [Counted once]: a parameter that is split over the model parallel group counts on each of its ranks; one that is
replicated there counts on the group's first rank only, so that the sum over the group is the norm of the whole model.
"""
import math

import torch

from deepspeed.comm import collectives
from deepspeed.comm.mpu import bwc_tensor_model_parallel_group, bwc_tensor_model_parallel_rank
from deepspeed.comm.reduce_op import ReduceOp


def is_model_parallel_parameter(p):
    """Whether the parameter is split over the model parallel ranks."""
    return bool(getattr(p, "model_parallel", False) or getattr(p, "tensor_model_parallel", False))


def get_global_norm(norm_list):
    """The 2-norm of a whole from the 2-norms of its parts."""
    return math.sqrt(sum(float(norm)**2.0 for norm in norm_list))


def _power_sum(tensors, norm_type):
    """Sum of |x|^norm_type over all elements as fp64 (the largest |x| for the infinity norm)."""
    tensors = list(tensors)
    device = tensors[0].device if tensors else torch.device("cpu")
    if norm_type == math.inf:
        values = [tensor.detach().abs().amax().double() for tensor in tensors if tensor.numel()]
        return torch.stack(values).max() if values else torch.zeros((), dtype=torch.float64, device=device)
    total = torch.zeros((), dtype=torch.float64, device=device)
    for tensor in tensors:
        norm = torch.linalg.vector_norm(tensor.detach(), norm_type, dtype=torch.float32)
        total += norm.double()**norm_type
    return total


def _norm(tensors, norm_type, mpu):
    norm_type = float(norm_type)
    if norm_type <= 0.0:
        raise ValueError(f"norm_type must be positive, got {norm_type}")
    total = _power_sum(tensors, norm_type)
    if mpu is not None:
        op = ReduceOp.MAX if norm_type == math.inf else ReduceOp.SUM
        collectives.all_reduce(total, op=op, group=bwc_tensor_model_parallel_group(mpu))
    return total if norm_type == math.inf else total**(1.0 / norm_type)


def _counted(parameters, mpu):
    first = bwc_tensor_model_parallel_rank(mpu) == 0
    return [p for p in parameters if mpu is None or first or is_model_parallel_parameter(p)]


def _as_list(parameters):
    return [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)


def get_grad_norm(parameters, norm_type=2, mpu=None):
    """Norm of all gradients, over the model parallel group of `mpu`; -1 when it is not finite."""
    with_grad = [p for p in _as_list(parameters) if p.grad is not None]
    norm = float(_norm((p.grad for p in _counted(with_grad, mpu)), norm_type, mpu))
    return norm if math.isfinite(norm) else -1.0


def get_weight_norm(parameters, norm_type=2, mpu=None):
    """Norm of all parameters, over the model parallel group of `mpu`; -1 when it is not finite."""
    norm = float(_norm(_counted(_as_list(parameters), mpu), norm_type, mpu))
    return norm if math.isfinite(norm) else -1.0


def clip_grad_norm_(parameters, max_norm, norm_type=2, mpu=None):
    """Scales all gradients in place so that their norm is at most `max_norm`; returns the norm before (0-dim fp32 tensor)."""
    with_grad = [p for p in _as_list(parameters) if p.grad is not None]
    norm = _norm((p.grad for p in _counted(with_grad, mpu)), norm_type, mpu)
    factor = (float(max_norm) / (norm + 1e-6)).clamp(max=1.0)
    for p in with_grad:
        p.grad.detach().mul_(factor.to(p.grad.device, p.grad.dtype))
    return norm.float()


def get_global_norm_of_tensors(input_tensors, norm_type=2, mpu=None, use_graph=False, moe_ep_group=None):
    """Norm of the tensors, summed over the groups of `mpu` and `moe_ep_group` if given; 0-dim tensor; -1 when not finite."""
    norm_type = float(norm_type)
    total = _power_sum(input_tensors, norm_type)
    op = ReduceOp.MAX if norm_type == math.inf else ReduceOp.SUM
    if mpu is not None:
        collectives.all_reduce(total, op=op, group=bwc_tensor_model_parallel_group(mpu))
    if moe_ep_group is not None:
        collectives.all_reduce(total, op=op, group=moe_ep_group)
    norm = total if norm_type == math.inf else total**(1.0 / norm_type)
    return torch.where(norm.isfinite(), norm, torch.full_like(norm, -1.0)).float()


def clip_tensors_by_global_norm(input_tensors, max_norm=1.0, global_norm=None, mpu=None, eps=1e-6, use_graph=False):
    """Scales the tensors in place so that their common norm is at most `max_norm`; returns the norm before."""
    if global_norm is None:
        global_norm = get_global_norm_of_tensors(input_tensors, mpu=mpu)
    factor = max_norm / (float(global_norm) + eps)
    if 0.0 < factor < 1.0:
        for tensor in input_tensors:
            tensor.detach().mul_(factor)
    return global_norm
