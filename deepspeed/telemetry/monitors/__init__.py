# SPDX-License-Identifier: Apache-2.0
"""Where training curves go: files for people (CSV, TensorBoard) and services (Weights & Biases, Comet). Rank 0 only."""
from deepspeed._lazy import attach, names

__getattr__, __dir__, __all__ = attach(__name__, {
    **names("deepspeed.telemetry.monitors.sink", "Monitor"),
    **names("deepspeed.telemetry.monitors.master", "MonitorMaster"),
    **names("deepspeed.telemetry.monitors.csv_files", "csvMonitor", "read_csv"),
    **names("deepspeed.telemetry.monitors.tensorboard", "TensorBoardMonitor"),
    **names("deepspeed.telemetry.monitors.wandb", "WandbMonitor"),
    **names("deepspeed.telemetry.monitors.comet", "CometMonitor"),
})
