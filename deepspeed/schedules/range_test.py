# SPDX-License-Identifier: Apache-2.0
"""Learning-rate range test (Smith, 2015, "Cyclical Learning Rates for Training Neural Networks")."""

from __future__ import annotations

from typing import Any

from .schedule import Schedule, per_group, real, whole


class LRRangeTest(Schedule):
    """Let the rate grow without bound, to see at which one training diverges.

    After k steps the rate is ``min * (1 + rate * k / step_size)``; with ``staircase`` k / step_size is rounded down.
    """

    def __init__(self,
                 optimizer: Any,
                 lr_range_test_min_lr: Any = 1e-3,
                 lr_range_test_step_size: int = 2000,
                 lr_range_test_step_rate: float = 1.0,
                 lr_range_test_staircase: bool = False,
                 last_batch_iteration: int = -1) -> None:
        super().__init__(optimizer, last_batch_iteration)
        self.min_lr = per_group("lr_range_test_min_lr", lr_range_test_min_lr, self.param_groups)
        self.step_size = whole("lr_range_test_step_size", lr_range_test_step_size, at_least=1)
        self.step_rate = real("lr_range_test_step_rate", lr_range_test_step_rate)
        self.staircase = bool(lr_range_test_staircase)
        self.apply()

    def initial_lrs(self) -> list[float]:
        return list(self.min_lr)

    def lrs_at(self, t: int) -> list[float]:
        k = t + 1
        intervals = k // self.step_size if self.staircase else k / self.step_size
        return [lr * (1.0 + self.step_rate * intervals) for lr in self.min_lr]
