# SPDX-License-Identifier: Apache-2.0
"""Import path users have; the code is in deepspeed.device."""
from deepspeed.device.cpu import CPU_Accelerator  # noqa: F401
