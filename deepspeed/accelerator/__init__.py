# SPDX-License-Identifier: Apache-2.0
"""Import path users have; the code is in deepspeed.device."""
from deepspeed._lazy import attach, names

__getattr__, __dir__, __all__ = attach(__name__, {
    **names("deepspeed.device", "DeepSpeedAccelerator", "get_accelerator", "set_accelerator",
            "is_current_accelerator_supported"),
    **{name: f"deepspeed.accelerator.{name}"
       for name in ("abstract_accelerator", "real_accelerator", "cpu_accelerator", "cuda_accelerator")},
})
