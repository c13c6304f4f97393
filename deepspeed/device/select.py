# SPDX-License-Identifier: Apache-2.0
"""Which device this process computes on: the caller's, $DS_ACCELERATOR's, or CUDA if there is any and else the CPU."""
from deepspeed._environment import read

SUPPORTED_ACCELERATOR_LIST = ["cuda", "cpu"]


class _Choice:
    accelerator = None


def get_accelerator():
    """The process-wide DeepSpeedAccelerator, chosen at the first call."""
    if _Choice.accelerator is None:
        _Choice.accelerator = _choose()
    return _Choice.accelerator


def set_accelerator(accelerator):
    """Makes `accelerator`, an instance of a DeepSpeedAccelerator, the one of this process. None: choose anew when asked."""
    from deepspeed.device.interface import DeepSpeedAccelerator

    if accelerator is not None and not isinstance(accelerator, DeepSpeedAccelerator):
        raise TypeError(f"set_accelerator needs an instance of DeepSpeedAccelerator, got {type(accelerator).__name__}")
    _Choice.accelerator = accelerator


def is_current_accelerator_supported():
    return get_accelerator()._name in SUPPORTED_ACCELERATOR_LIST


def _choose():
    wanted = read("DS_ACCELERATOR")
    if wanted is not None and wanted not in SUPPORTED_ACCELERATOR_LIST:
        raise ValueError(f"DS_ACCELERATOR={wanted!r} is not supported; one of {', '.join(SUPPORTED_ACCELERATOR_LIST)} is. "
                         "Another device can be brought with set_accelerator().")
    from deepspeed.device.cpu import CPU_Accelerator
    from deepspeed.device.cuda import CUDA_Accelerator

    if wanted == "cpu":
        return CPU_Accelerator()
    cuda = CUDA_Accelerator()
    if cuda.is_available():
        return cuda
    if wanted == "cuda":
        import torch

        why = "no usable NVIDIA GPU was found" if torch.version.cuda else "the installed torch is built without CUDA"
        raise RuntimeError(f"DS_ACCELERATOR=cuda, but {why}")
    return CPU_Accelerator()
