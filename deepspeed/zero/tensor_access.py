# SPDX-License-Identifier: Apache-2.0
"""Reading and writing a parameter's fp32 value, gradient and optimizer state, wherever its slices lie.

The full variants are collective over the data-parallel ranks and return a tensor of the parameter's shape on every rank;
None when the parameter is not trained or the value does not exist yet. Gradients exist between backward and step. Under hybrid
sharding the local gradient, too, is collective: it is the sum over the replicas.
"""
import torch

from deepspeed.zero.managed import home_of
from deepspeed.zero.split_master import plain
from deepspeed.zero.tensors import in_memory_order, shaped_like


def _optimizer_of(parameter):
    home = home_of(parameter)
    return home, (getattr(home.owner, "optimizer", None) if home is not None else None)


def _slice(parameter, kind, key=None):
    """This rank's slice (a 1-D view, but for split masters), or None."""
    home, optimizer = _optimizer_of(parameter)
    if optimizer is None:
        return None
    return plain(optimizer.read_slice(parameter, kind, key))


def _full(parameter, kind, key=None):
    home, optimizer = _optimizer_of(parameter)
    if optimizer is None:
        return None
    mine = optimizer.read_slice(parameter, kind, key)
    if mine is None:
        return None
    mine = plain(mine).to(home.owner.device)   # also when it rests on the host
    whole = home.owner.gather_slices(parameter, mine) if optimizer.slices_are_partial(kind) else mine.clone()
    home.owner.leave_files()
    return shaped_like(whole, parameter)


def _set_full(parameter, value, kind, key=None):
    home, optimizer = _optimizer_of(parameter)
    mine = None if optimizer is None else optimizer.slice_of(parameter, kind, key)
    if mine is None:
        raise ValueError(f"parameter '{home.name if home else '?'}' has no {key or kind} to set: it is not trained by an engine, "
                         "or the value does not exist yet")
    if tuple(value.shape) != tuple(parameter.shape):
        raise ValueError(f"parameter '{home.name}' has shape {tuple(parameter.shape)}, the new value {tuple(value.shape)}")
    flat = in_memory_order(value.detach(), parameter)
    if optimizer.slices_are_partial(kind):
        _, begin, _, numel = home.owner.place(parameter)
        flat = flat[begin:begin + numel]
    with torch.no_grad():
        mine.copy_(flat)
    if kind == "fp32":
        optimizer.refresh_parameter(parameter)
    elif kind == "grad":
        optimizer.gradient_was_set(parameter)
    home.owner.leave_files()


def safe_get_full_fp32_param(param):
    """The fp32 master value."""
    return _full(param, "fp32")


def safe_set_full_fp32_param(param, value):
    """Sets the fp32 master value and the parameter itself. Collective."""
    _set_full(param, value, "fp32")


def safe_get_full_grad(param):
    """The gradient, averaged over ranks and accumulated, unscaled."""
    home, optimizer = _optimizer_of(param)
    if optimizer is None:
        return param.grad if not hasattr(param, "ds_id") else None
    grad = _full(param, "grad")
    return None if grad is None else grad.mul_(1.0 / optimizer.loss_scale)


def safe_set_full_grad(param, value):
    """Sets the gradient that step() uses; norm, clipping and the check for non-finite values see the new one. Collective."""
    home, optimizer = _optimizer_of(param)
    _set_full(param, value * (optimizer.loss_scale if optimizer is not None else 1.0), "grad")


def safe_get_full_optimizer_state(param, optim_state_key):
    """One optimizer state of the parameter's shape, such as "exp_avg"."""
    return _full(param, "state", optim_state_key)


def safe_set_full_optimizer_state(param, value, optim_state_key):
    _set_full(param, value, "state", optim_state_key)


def safe_get_local_fp32_param(param):
    return _slice(param, "fp32")


def safe_get_local_grad(param):
    home, optimizer = _optimizer_of(param)
    mine = _slice(param, "grad")
    return None if mine is None else mine / optimizer.loss_scale


def safe_get_local_optimizer_state(param, optim_state_key):
    return _slice(param, "state", optim_state_key)


def _set_local(param, value, kind, key=None):
    home, optimizer = _optimizer_of(param)
    mine = None if optimizer is None else optimizer.slice_of(param, kind, key)
    if mine is None:
        raise ValueError(f"parameter '{home.name if home else '?'}' has no local {key or kind} to set")
    if value.numel() != mine.numel():
        raise ValueError(f"the local slice of parameter '{home.name}' has {mine.numel()} elements, the new value {value.numel()}")
    with torch.no_grad():
        mine.copy_(value.detach().reshape(-1))
    if kind == "fp32":
        optimizer.refresh_parameter(param)
    elif kind == "grad":
        optimizer.gradient_was_set(param)


def safe_set_local_fp32_param(param, value):
    """Sets this rank's slice; every rank must call it, since the parameter is refreshed everywhere."""
    _set_local(param, value, "fp32")


def safe_set_local_grad(param, value):
    """Sets this rank's slice of the gradient."""
    home, optimizer = _optimizer_of(param)
    _set_local(param, value * (optimizer.loss_scale if optimizer is not None else 1.0), "grad")


def safe_set_local_optimizer_state(param, value, optim_state_key):
    _set_local(param, value, "state", optim_state_key)


def safe_update_full_grad_vectorized(param_list, update_func):
    """grad = update_func(grad, param) for every parameter that has one. Collective."""
    for param in param_list:
        grad = safe_get_full_grad(param)
        if grad is not None:
            safe_set_full_grad(param, update_func(grad, param))


# The low-level accessors that older callers use.
get_full_hp_grad = safe_get_full_grad
set_full_hp_grad = safe_set_full_grad


def get_full_hp_param(param, optim_state_key=None):
    """The fp32 master value, or the optimizer state of this name."""
    return safe_get_full_fp32_param(param) if optim_state_key is None else safe_get_full_optimizer_state(param, optim_state_key)


def set_full_hp_param(param, value, optim_state_key=None):
    if optim_state_key is None:
        safe_set_full_fp32_param(param, value)
    else:
        safe_set_full_optimizer_state(param, value, optim_state_key)
