# SPDX-License-Identifier: Apache-2.0
"""Import path users have; the names are in deepspeed._config_keys."""
from deepspeed._config_keys import KEYS
from deepspeed._lazy import attach, names

__getattr__, __dir__, __all__ = attach(__name__, names("deepspeed._config_keys", *KEYS))
