# SPDX-License-Identifier: Apache-2.0
"""Import path users have for the names of deepspeed.comm."""
import deepspeed.comm as _comm
from deepspeed._lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, {name: f"deepspeed.comm:{name}" for name in _comm.__all__})
