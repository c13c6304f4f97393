# SPDX-License-Identifier: Apache-2.0
"""Import path users have; the code is in deepspeed.telemetry."""
from deepspeed._lazy import attach, names

__getattr__, __dir__, __all__ = attach(__name__, {
    **names("deepspeed.telemetry.logs",
            "logger", "log_dist", "log_dist_once", "print_dist", "print_json_dist", "get_log_level_from_string",
            "set_log_level_from_string", "get_current_level", "should_log_le"),
})
