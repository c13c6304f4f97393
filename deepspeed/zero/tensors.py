# SPDX-License-Identifier: Apache-2.0
"""Finding tensors in what modules take and return; between a parameter and its elements in the order of memory."""
import dataclasses
from itertools import islice

import torch

_PLAIN = (str, bytes, int, float, complex, bool, type(None), type, torch.dtype, torch.device, torch.Size, torch.nn.Module)
_DEPTH = 8
# What every module has before its own attributes.
_MODULE_FIELDS = len(torch.nn.Module().__dict__)


def tensors_in(value, found=None, depth=_DEPTH):
    """All tensors inside nested tuples, lists, dicts, dataclasses and other objects with attributes."""
    if found is None:
        found = []
    if isinstance(value, torch.Tensor):
        found.append(value)
    elif isinstance(value, _PLAIN) or depth == 0:
        return found
    elif isinstance(value, (list, tuple)):
        for item in value:
            tensors_in(item, found, depth - 1)
    elif isinstance(value, dict):
        for item in value.values():
            tensors_in(item, found, depth - 1)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            tensors_in(getattr(value, field.name, None), found, depth - 1)
    elif not callable(value):
        for item in getattr(value, "__dict__", {}).values():
            tensors_in(item, found, depth - 1)
        for name in getattr(type(value), "__slots__", ()):
            tensors_in(getattr(value, name, None), found, depth - 1)
    return found


def attributes_with_graph(dicts):
    """Tensors with a graph that modules keep as plain attributes, such as an auxiliary loss; `dicts`: the modules' __dict__."""
    found = []
    for attributes in dicts:
        for value in islice(attributes.values(), _MODULE_FIELDS, None):
            if isinstance(value, torch.Tensor) or (value and isinstance(value, (list, tuple, dict))):
                tensors_in(value, found, 2)
    return [t for t in found if t.grad_fn is not None]


def shaped_like(flat, parameter):
    """A view of `flat` [numel], which holds a parameter's elements in the order of memory (channels_last, say), with its shape."""
    return torch.as_strided(flat, parameter.shape, parameter.stride(), flat.storage_offset())


def in_memory_order(value, parameter):
    """`value`, of the parameter's shape, as [numel] in the order in which the parameter lies in memory."""
    if value.stride() != parameter.stride():
        value = torch.empty_strided(parameter.shape, parameter.stride(), dtype=value.dtype, device=value.device).copy_(value)
    return torch.as_strided(value, (value.numel(),), (1,), value.storage_offset())
