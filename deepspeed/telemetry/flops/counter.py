# SPDX-License-Identifier: Apache-2.0
"""Sees every operation PyTorch runs and says what it costs."""
import time
from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from deepspeed.telemetry.flops.formulas import cost_of, has_formula


def in_backward():
    """Whether autograd is running a backward pass on this thread; what activation checkpointing recomputes is part of it."""
    return torch._C._current_graph_task_id() != -1


class OperationCounter(TorchDispatchMode):
    """While active, calls on_operation(cost) after every operation. Backward passes are left out.

    uncounted: calls of operations without a formula (of other libraries), by name. own_s: seconds spent on counting.
    """
    supports_higher_order_operators = True

    def __init__(self, on_operation):
        super().__init__()
        self._on_operation = on_operation
        self.uncounted = Counter()
        self.own_s = 0.0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if isinstance(func, torch._ops.HigherOrderOperator):
            self.uncounted[str(func)] += 1
            return func(*args, **kwargs)
        if torch.is_inference_mode_enabled() and not has_formula(func):  # composite operations arrive whole
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        out = func(*args, **kwargs)
        if not in_backward():
            began_s = time.perf_counter()
            cost = cost_of(func, args, kwargs, out)
            if cost is None:
                self.uncounted[func._overloadpacket._qualified_op_name] += 1
            elif cost.flops:
                self._on_operation(cost)
            self.own_s += time.perf_counter() - began_s
        return out
