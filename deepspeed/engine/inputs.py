# SPDX-License-Identifier: Apache-2.0
"""What happens to a batch on its way into the module."""
import contextlib

import torch

_AUTOCAST = {"fp16": torch.float16, "float16": torch.float16, "half": torch.float16, "torch.float16": torch.float16,
             "bf16": torch.bfloat16, "bfloat16": torch.bfloat16, "torch.bfloat16": torch.bfloat16}


def cast_positional(inputs, dtype):
    """Floating-point tensors among positional inputs in the model's dtype (fp16.auto_cast); keywords stay as they are."""
    def cast(value):
        if isinstance(value, torch.Tensor):
            return value.to(dtype) if value.is_floating_point() else value
        if isinstance(value, (list, tuple)):
            items = [cast(v) for v in value]
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        if isinstance(value, dict):
            return {k: cast(v) for k, v in value.items()}
        return value
    return tuple(cast(v) for v in inputs)


def autocast_dtype(section):
    return _AUTOCAST.get(str(section.dtype), torch.bfloat16) if section.enabled else None


def autocast_context(section, device):
    dtype = autocast_dtype(section)
    return torch.autocast(device.type, dtype=dtype) if dtype is not None else contextlib.nullcontext()
