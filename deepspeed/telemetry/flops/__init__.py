# SPDX-License-Identifier: Apache-2.0
"""Operations, parameters and time of a model's forward pass, module by module."""
from deepspeed._lazy import attach, names

__getattr__, __dir__, __all__ = attach(__name__, {
    **names("deepspeed.telemetry.flops.profiler", "FlopsProfiler", "get_model_profile"),
    **names("deepspeed.telemetry.flops.units", "number_to_string", "macs_to_string", "flops_to_string", "params_to_string",
            "duration_to_string", "bytes_to_string"),
})
