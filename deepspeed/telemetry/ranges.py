# SPDX-License-Identifier: Apache-2.0
"""Named ranges in the device's profiler."""
import functools

from deepspeed.device.select import get_accelerator


def instrument_w_nvtx(function):
    """Decorator: every call shows as a range of the function's name (NVTX on CUDA, nothing on the CPU)."""

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        accelerator = get_accelerator()
        accelerator.range_push(function.__qualname__)
        try:
            return function(*args, **kwargs)
        finally:
            accelerator.range_pop()

    return wrapper
