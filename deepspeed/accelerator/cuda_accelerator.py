# SPDX-License-Identifier: Apache-2.0
"""Import path users have; the code is in deepspeed.device."""
from deepspeed.device.cuda import CUDA_Accelerator  # noqa: F401
