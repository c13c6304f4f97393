# SPDX-License-Identifier: Apache-2.0
"""Import path users have; the code is in deepspeed._torch_version."""
from deepspeed._lazy import attach, names

__getattr__, __dir__, __all__ = attach(__name__, {
    **names("deepspeed._torch_version", "required_torch_version"),
})
