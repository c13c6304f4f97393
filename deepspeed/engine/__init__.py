# SPDX-License-Identifier: Apache-2.0
"""The training engine: `initialize` builds it, `DeepSpeedEngine` runs it."""
from deepspeed._lazy import attach, names

__getattr__, __dir__, __all__ = attach(__name__, {
    **names("deepspeed.engine.initialize", "initialize", "DeepSpeedOptimizerCallable", "DeepSpeedSchedulerCallable"),
    **names("deepspeed.engine.engine", "DeepSpeedEngine"),
    **names("deepspeed.zero.optimizer", "DeepSpeedOptimizer", "ZeROOptimizer"),
    **names("deepspeed.zero.optimizer_kinds", "BF16_Optimizer", "FP16_Optimizer", "FP16_UnfusedOptimizer"),
})
