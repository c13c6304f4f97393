# SPDX-License-Identifier: Apache-2.0
"""The operators ``torch.ops.deepspeed.*``, which the compiled module registers when it is loaded (csrc/ops)."""
import torch

from deepspeed._native import NativeExtensionError, lib


def ops():
    """The namespace of our operators; loads the compiled module the first time."""
    lib()
    return torch.ops.deepspeed


try:
    lib()  # now: torch.compile could not follow the import in a process whose first call is a compiled one
except NativeExtensionError:
    pass  # the first call says it
