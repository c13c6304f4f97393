# SPDX-License-Identifier: Apache-2.0
"""Import path users have; the code is in deepspeed.telemetry."""
from deepspeed._lazy import attach, names

__getattr__, __dir__, __all__ = attach(__name__, {
    **names("deepspeed.telemetry.names",
            "debug_clear_module_and_param_names", "debug_extract_module_and_param_names", "debug_module2name",
            "debug_module2name_class", "debug_param2name", "debug_param2name_id", "debug_param2name_id_shape"),
})
