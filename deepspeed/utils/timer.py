# SPDX-License-Identifier: Apache-2.0
"""Import path users have; the code is in deepspeed.telemetry."""
from deepspeed._lazy import attach, names

__getattr__, __dir__, __all__ = attach(__name__, {
    **names("deepspeed.telemetry.timers",
            "SynchronizedWallClockTimer", "ThroughputTimer", "NoopTimer", "trim_mean", "FORWARD_MICRO_TIMER",
            "FORWARD_GLOBAL_TIMER", "BACKWARD_MICRO_TIMER", "BACKWARD_GLOBAL_TIMER", "BACKWARD_INNER_MICRO_TIMER",
            "BACKWARD_INNER_GLOBAL_TIMER", "BACKWARD_REDUCE_MICRO_TIMER", "BACKWARD_REDUCE_GLOBAL_TIMER",
            "STEP_MICRO_TIMER", "STEP_GLOBAL_TIMER"),
})
