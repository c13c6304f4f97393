# SPDX-License-Identifier: Apache-2.0
"""Import path users have; the code is in deepspeed.device."""
from deepspeed.device.select import (  # noqa: F401
    SUPPORTED_ACCELERATOR_LIST, get_accelerator, is_current_accelerator_supported, set_accelerator)
