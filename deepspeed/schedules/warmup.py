# SPDX-License-Identifier: Apache-2.0
"""Warm-up, alone or followed by a linear or cosine decay."""

from __future__ import annotations

import math
import warnings
from typing import Any

from .schedule import Schedule, per_group, real, whole

WARMUP_LOG_RATE = "log"
WARMUP_LINEAR_RATE = "linear"


class _Warmup(Schedule):
    """Warm-up factor: ln(t+1)/ln(N) or t/N for t < N, then 1."""

    def __init__(self, optimizer: Any, warmup_num_steps: int, warmup_type: str, last_batch_iteration: int) -> None:
        super().__init__(optimizer, last_batch_iteration)
        # ln(1) is no divisor, so at least 2. Zero is what people write for "no warm-up" and means the same here.
        self.warmup_num_steps = max(2, whole("warmup_num_steps", warmup_num_steps, at_least=0))
        if warmup_type not in (WARMUP_LOG_RATE, WARMUP_LINEAR_RATE):
            warnings.warn(f"warmup_type: unknown value {warmup_type!r}, using 'log' (allowed: 'log', 'linear')")
            warmup_type = WARMUP_LOG_RATE
        self.warmup_type = warmup_type

    def warmup_factor(self, t: int) -> float:
        n = self.warmup_num_steps
        if t >= n:
            return 1.0
        return math.log(t + 1) / math.log(n) if self.warmup_type == WARMUP_LOG_RATE else t / n


def _warn_if_never_decays(total: int, warmup: int) -> None:
    if total < warmup:
        warnings.warn(f"total_num_steps ({total}) is less than warmup_num_steps ({warmup}): "
                      "the rate falls to its end value right after the warm-up")


class WarmupLR(_Warmup):
    """Raise the rate from ``warmup_min_lr`` to ``warmup_max_lr`` in ``warmup_num_steps`` updates, then hold it.

    ``warmup_max_lr=None`` means each group's own rate. Minimum and maximum are a number or a list with one per group.
    """

    def __init__(self,
                 optimizer: Any,
                 warmup_min_lr: Any = 0.0,
                 warmup_max_lr: Any = None,
                 warmup_num_steps: int = 1000,
                 warmup_type: str = WARMUP_LOG_RATE,
                 last_batch_iteration: int = -1) -> None:
        super().__init__(optimizer, warmup_num_steps, warmup_type, last_batch_iteration)
        groups = self.param_groups
        self.min_lrs = per_group("warmup_min_lr", warmup_min_lr, groups)
        self.max_lrs = self.group_lrs() if warmup_max_lr is None else per_group("warmup_max_lr", warmup_max_lr, groups)
        self.apply()

    def factor(self, t: int) -> float:
        return self.warmup_factor(t)

    def initial_lrs(self) -> list[float]:
        return list(self.min_lrs)

    def lrs_at(self, t: int) -> list[float]:
        factor = self.factor(t)
        # At the ends give the very number the user wrote, not one rounded by the interpolation.
        if factor in (0.0, 1.0):
            return list(self.max_lrs if factor else self.min_lrs)
        return [low + (high - low) * factor for low, high in zip(self.min_lrs, self.max_lrs)]


class WarmupDecayLR(WarmupLR):
    """:class:`WarmupLR`, then a straight line down to ``warmup_min_lr`` at ``total_num_steps``."""

    def __init__(self,
                 optimizer: Any,
                 total_num_steps: int,
                 warmup_min_lr: Any = 0.0,
                 warmup_max_lr: Any = 0.001,
                 warmup_num_steps: int = 1000,
                 warmup_type: str = WARMUP_LOG_RATE,
                 last_batch_iteration: int = -1) -> None:
        self.total_num_steps = whole("total_num_steps", total_num_steps, at_least=1)
        super().__init__(optimizer, warmup_min_lr, warmup_max_lr, warmup_num_steps, warmup_type, last_batch_iteration)
        _warn_if_never_decays(self.total_num_steps, self.warmup_num_steps)

    def factor(self, t: int) -> float:
        if t < self.warmup_num_steps:
            return self.warmup_factor(t)
        length = max(1, self.total_num_steps - self.warmup_num_steps)
        return max(0.0, (self.total_num_steps - t) / length)


class WarmupCosineLR(_Warmup):
    """Scale each group's own rate: from ``warmup_min_ratio`` to 1, then along a cosine to ``cos_min_ratio``.

    Before the first step the rate is 0. After ``total_num_steps`` it stays at ``cos_min_ratio``.
    """

    def __init__(self,
                 optimizer: Any,
                 total_num_steps: int,
                 warmup_min_ratio: float = 0.0,
                 warmup_num_steps: int = 1000,
                 cos_min_ratio: float = 0.0001,
                 warmup_type: str = WARMUP_LOG_RATE,
                 last_batch_iteration: int = -1) -> None:
        super().__init__(optimizer, warmup_num_steps, warmup_type, last_batch_iteration)
        self.total_num_steps = whole("total_num_steps", total_num_steps, at_least=1)
        self.warmup_min_ratio = real("warmup_min_ratio", warmup_min_ratio)
        self.cos_min_ratio = real("cos_min_ratio", cos_min_ratio)
        _warn_if_never_decays(self.total_num_steps, self.warmup_num_steps)
        self.org_lrs = self.group_lrs()
        self.apply()

    def ratio(self, t: int) -> float:
        if t < self.warmup_num_steps:
            return self.warmup_min_ratio + (1.0 - self.warmup_min_ratio) * self.warmup_factor(t)
        length = max(1, self.total_num_steps - self.warmup_num_steps)
        progress = min(1.0, (t - self.warmup_num_steps + 1) / length)
        return self.cos_min_ratio + (1.0 - self.cos_min_ratio) * 0.5 * (1.0 + math.cos(math.pi * progress))

    def initial_lrs(self) -> list[float]:
        return [0.0] * len(self.org_lrs)

    def lrs_at(self, t: int) -> list[float]:
        ratio = self.ratio(t)
        return [lr * ratio for lr in self.org_lrs]
