# SPDX-License-Identifier: Apache-2.0
"""The operators ``torch.ops.deepspeed.*``, which the compiled module registers when it is loaded (csrc/ops)."""
import torch

from deepspeed._native import NativeExtensionError, lib


def ops():
    """The namespace of our operators; loads the compiled module the first time."""
    lib()
    return torch.ops.deepspeed


def check_dense(**tensors):
    """For what asks a tensor for its shape before an operator sees it; the operators refuse the same (csrc/ops/dense.cpp)."""
    for name, t in tensors.items():
        if t is None:
            continue
        if not isinstance(t, torch.Tensor):
            raise ValueError(f"{name} must be a tensor, not {type(t).__name__}")
        if t.is_nested or t.layout != torch.strided:
            raise ValueError(f"{name} must be a dense tensor, " + ("it is nested" if t.is_nested else f"its layout is {t.layout}"))


def check_given(**tensors):
    """check_dense() of arguments that may not be None."""
    for name, t in tensors.items():
        if t is None:
            raise ValueError(f"{name} must be a tensor, not None")
    check_dense(**tensors)



try:
    lib()  # now: torch.compile could not follow the import in a process whose first call is a compiled one
except NativeExtensionError:
    pass  # the first call says it
