# SPDX-License-Identifier: Apache-2.0
"""The device this process computes on: one interface, a CPU and a CUDA implementation. Imports no torch by itself."""
from deepspeed._lazy import attach, names

__getattr__, __dir__, __all__ = attach(__name__, {
    **names("deepspeed.device.interface", "DeepSpeedAccelerator"),
    **names("deepspeed.device.cpu", "CPU_Accelerator"),
    **names("deepspeed.device.cuda", "CUDA_Accelerator"),
    **names("deepspeed.device.select", "get_accelerator", "set_accelerator", "is_current_accelerator_supported",
            "SUPPORTED_ACCELERATOR_LIST"),
    **names("deepspeed.device.on_device", "OnDevice"),
    **names("deepspeed.device.numa", "get_numactl_cmd"),
    **names("deepspeed.device.transfer", "move_to_device", "copy_to_device"),
    **names("deepspeed.device.seed", "set_random_seed"),
})
