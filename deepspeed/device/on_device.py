# SPDX-License-Identifier: Apache-2.0
"""OnDevice: build a model on another device and in another type than the default, without touching its code."""
import torch


class OnDevice:
    """Under it, new tensors are of type `dtype` and on `device` unless the code that makes them says otherwise.

    `with OnDevice(dtype=torch.bfloat16, device="meta"): model = Model()` makes a model that has shapes and no memory.
    """

    def __init__(self, dtype, device="meta", enabled=True):
        if dtype is not None and not dtype.is_floating_point:
            raise ValueError(f"OnDevice: dtype must be a floating type, got {dtype}")
        self.dtype = dtype
        self.device = torch.device(device)
        self.enabled = enabled
        self._saved = []  # a stack: the same object may be entered again inside

    def __enter__(self):
        if self.enabled:
            default_dtype = torch.get_default_dtype()
            device = torch.device(self.device)
            if self.dtype is not None:
                torch.set_default_dtype(self.dtype)
            device.__enter__()
            self._saved.append((default_dtype, device))
        return self

    def __exit__(self, *exception):
        if self.enabled:
            default_dtype, device = self._saved.pop()
            device.__exit__(*exception)
            torch.set_default_dtype(default_dtype)
        return False
