# SPDX-License-Identifier: Apache-2.0
"""The operators ``torch.ops.deepspeed.*``, which the compiled module registers when it is loaded (csrc/ops)."""
import torch

from deepspeed._native import lib


def ops():
    """The namespace of our operators; loads the compiled module the first time."""
    lib()
    return torch.ops.deepspeed
