# SPDX-License-Identifier: Apache-2.0
"""Finding tensors in what modules take and return."""
import dataclasses

import torch


def tensors_in(value, found=None):
    """All tensors inside nested tuples, lists, dicts and dataclasses."""
    if found is None:
        found = []
    if isinstance(value, torch.Tensor):
        found.append(value)
    elif isinstance(value, (list, tuple)):
        for item in value:
            tensors_in(item, found)
    elif isinstance(value, dict):
        for item in value.values():
            tensors_in(item, found)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            tensors_in(getattr(value, field.name), found)
    return found
