# SPDX-License-Identifier: Apache-2.0
"""Import path users have; the code is in deepspeed.telemetry."""
from deepspeed._lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, {"flops_profiler": "deepspeed.profiling.flops_profiler"})
