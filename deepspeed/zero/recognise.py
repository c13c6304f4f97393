# SPDX-License-Identifier: Apache-2.0
"""Telling apart what ZeRO manages and what it does not."""
import torch

from deepspeed._errors import ZeRORuntimeException  # noqa: F401

# Optimizers that treat every element by itself, so that stepping a slice is stepping the whole, and that are tested here.
ZERO_SUPPORTED_OPTIMIZERS = [torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad, torch.optim.SGD]


def is_zero_param(parameter):
    """Whether the tensor is a parameter that ZeRO-3 partitions."""
    return torch.is_tensor(parameter) and hasattr(parameter, "ds_id")


def is_zero_supported_optimizer(optimizer):
    """Whether the optimizer is one that is tested under ZeRO: our own, or a plain one of torch.optim listed above."""
    kind = type(optimizer)
    return kind in ZERO_SUPPORTED_OPTIMIZERS or kind.__module__.startswith("deepspeed.ops.")
