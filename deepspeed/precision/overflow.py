# SPDX-License-Identifier: Apache-2.0
"""CheckOverflow: does any rank have a gradient that is not finite? For training loops written by hand."""
import torch

from deepspeed.comm import collectives, process_group
from deepspeed.comm.mpu import bwc_tensor_model_parallel_group
from deepspeed.comm.reduce_op import ReduceOp


class CheckOverflow:
    """param_groups: parameters, or param group dicts of an optimizer. `check()` is collective."""

    def __init__(self, param_groups=None, mpu=None, zero_reduce_scatter=False, deepspeed=None):
        self.mpu = mpu
        self.params = self._flatten(param_groups) if param_groups is not None else None

    @staticmethod
    def _flatten(param_groups):
        params = []
        for group in param_groups:
            if isinstance(group, dict):
                group = group["params"]
            params += [group] if isinstance(group, torch.Tensor) else list(group)
        return params

    def check(self, param_groups=None):
        """Whether any gradient on any rank holds inf or nan."""
        params = self.params if param_groups is None else self._flatten(param_groups)
        if params is None:
            raise ValueError("CheckOverflow.check needs parameters: pass them here or to the constructor")
        return self.has_overflow(params)

    def has_overflow(self, params, has_moe_params=None):
        mine = self.has_overflow_serial(params)
        if not process_group.is_initialized():
            return mine
        device = next((p.grad.device for p in params if p.grad is not None), torch.device("cpu"))
        flag = torch.tensor([float(mine)], device=device)
        collectives.all_reduce(flag, op=ReduceOp.MAX)
        return bool(flag.item())

    def has_overflow_serial(self, params):
        """The same for this rank alone."""
        return any(self._has_inf_or_nan(p.grad) for p in params if p.grad is not None)

    def check_using_norm(self, norm_group, reduce_overflow=True):
        """Whether a norm of the list is -1, inf or nan, which is how an overflow shows in it."""
        mine = any(float(norm) == -1.0 or not torch.isfinite(torch.as_tensor(float(norm))) for norm in norm_group)
        if not (reduce_overflow and process_group.is_initialized()):
            return mine
        from deepspeed.device.select import get_accelerator

        flag = torch.tensor([float(mine)], device=get_accelerator().current_device_name())
        collectives.all_reduce(flag, op=ReduceOp.MAX)
        if self.mpu is not None:
            collectives.all_reduce(flag, op=ReduceOp.MAX, group=bwc_tensor_model_parallel_group(self.mpu))
        return bool(flag.item())

    @staticmethod
    def _has_inf_or_nan(x, i=None):
        return not bool(torch.isfinite(x).all())
