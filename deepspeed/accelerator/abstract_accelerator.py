# SPDX-License-Identifier: Apache-2.0
"""Import path users have; the code is in deepspeed.device."""
from deepspeed.device.interface import DeepSpeedAccelerator  # noqa: F401
