# SPDX-License-Identifier: Apache-2.0
"""Import path users have; the code is in deepspeed.telemetry.monitors."""
from deepspeed._lazy import attach, names

__getattr__, __dir__, __all__ = attach(__name__, {
    **names("deepspeed.telemetry.monitors", "MonitorMaster"),
    **{name: f"deepspeed.monitor.{name}" for name in ("comet", "config", "csv_monitor", "monitor", "tensorboard", "wandb")},
})
