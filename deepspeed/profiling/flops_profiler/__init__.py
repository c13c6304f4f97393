# SPDX-License-Identifier: Apache-2.0
"""Import path users have; the code is in deepspeed.telemetry.flops."""
from deepspeed._lazy import attach, names

__getattr__, __dir__, __all__ = attach(__name__, {
    **names("deepspeed.telemetry.flops", "FlopsProfiler", "get_model_profile", "number_to_string", "macs_to_string", "flops_to_string",
            "params_to_string", "duration_to_string", "bytes_to_string"),
    "profiler": "deepspeed.profiling.flops_profiler.profiler",
})
