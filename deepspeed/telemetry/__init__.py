# SPDX-License-Identifier: Apache-2.0
"""What the library says about itself: log lines, timers, memory figures. Imports no torch by itself."""
from deepspeed._lazy import attach, names

__getattr__, __dir__, __all__ = attach(__name__, {
    **names("deepspeed.telemetry.logs", "logger", "log_dist", "log_dist_once", "report", "set_log_level_from_string",
            "get_current_level", "should_log_le", "print_dist", "print_json_dist", "get_caller_func"),
    **names("deepspeed.telemetry.timers", "SynchronizedWallClockTimer", "ThroughputTimer", "NoopTimer"),
    **names("deepspeed.telemetry.memory", "see_memory_usage", "memory_status", "get_ma_status", "empty_cache"),
    **names("deepspeed.telemetry.ranges", "instrument_w_nvtx"),
    **names("deepspeed.telemetry.monitors", "MonitorMaster"),
    **names("deepspeed.telemetry.flops", "FlopsProfiler", "get_model_profile"),
})
