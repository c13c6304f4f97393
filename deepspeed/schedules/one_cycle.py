# SPDX-License-Identifier: Apache-2.0
"""The 1-cycle policy (Smith, 2018, "A disciplined approach to neural network hyper-parameters")."""

from __future__ import annotations

import warnings
from typing import Any

from .schedule import Schedule, per_group, real, whole


class OneCycle(Schedule):
    """Up from ``cycle_min_lr`` to ``cycle_max_lr`` and down again, then an optional decay.

    The momentum (first beta) moves against the rate between ``cycle_max_mom`` and ``cycle_min_mom``; the second beta
    is 0.99 meanwhile. A stair count quantises its half of the cycle into that many levels. After the cycle, k further
    steps divide the rate by ``1 + decay_lr_rate * k / decay_step_size`` and multiply the momentum likewise; a
    ``decay_step_size`` of 0 holds both.
    """

    SECOND_BETA = 0.99

    def __init__(self,
                 optimizer: Any,
                 cycle_min_lr: Any,
                 cycle_max_lr: Any,
                 decay_lr_rate: float = 0.0,
                 cycle_first_step_size: int = 2000,
                 cycle_second_step_size: int | None = None,
                 cycle_first_stair_count: int = 0,
                 cycle_second_stair_count: int | None = None,
                 decay_step_size: int = 0,
                 cycle_momentum: bool = True,
                 cycle_min_mom: Any = 0.8,
                 cycle_max_mom: Any = 0.9,
                 decay_mom_rate: float = 0.0,
                 last_batch_iteration: int = -1) -> None:
        super().__init__(optimizer, last_batch_iteration)
        groups = self.param_groups
        self.min_lrs = per_group("cycle_min_lr", cycle_min_lr, groups)
        self.max_lrs = per_group("cycle_max_lr", cycle_max_lr, groups)
        self.first_size = whole("cycle_first_step_size", cycle_first_step_size, at_least=1)
        self.second_size = (self.first_size if cycle_second_step_size is None else whole(
            "cycle_second_step_size", cycle_second_step_size, at_least=0))
        self.total_size = self.first_size + self.second_size
        self.first_stairs = whole("cycle_first_stair_count", cycle_first_stair_count, at_least=0)
        self.second_stairs = (self.first_stairs if cycle_second_stair_count is None else whole(
            "cycle_second_stair_count", cycle_second_stair_count, at_least=0))
        self.decay_step_size = whole("decay_step_size", decay_step_size, at_least=0)
        self.decay_lr_rate = real("decay_lr_rate", decay_lr_rate)
        self.decay_mom_rate = real("decay_mom_rate", decay_mom_rate)
        self.cycle_momentum = bool(cycle_momentum)
        if self.cycle_momentum and not all("betas" in group for group in groups):
            warnings.warn(f"cycle_momentum: {type(self.optimizer).__name__} has no betas, the momentum is left alone")
            self.cycle_momentum = False
        self.min_moms = per_group("cycle_min_mom", cycle_min_mom, groups)
        self.max_moms = per_group("cycle_max_mom", cycle_max_mom, groups)
        self.apply()

    def _height(self, k: int) -> float:
        """Position between minimum (0) and maximum (1) after k steps, k < total_size."""
        if k <= self.first_size:
            part, size, stairs = k, self.first_size, self.first_stairs
        else:
            part, size, stairs = self.total_size - k, self.second_size, self.second_stairs
        # Whole-number division: in floats 0.29 * 100 is just below 29 and would land one stair too low.
        return (part * stairs // size) / stairs if stairs else part / size

    def _decay_intervals(self, k: int) -> float:
        return (k - self.total_size) / self.decay_step_size if self.decay_step_size else 0.0

    def initial_lrs(self) -> list[float]:
        return list(self.min_lrs)

    def lrs_at(self, t: int) -> list[float]:
        k = t + 1
        if k < self.total_size:
            height = self._height(k)
            return [low + (high - low) * height for low, high in zip(self.min_lrs, self.max_lrs)]
        divisor = 1.0 + self.decay_lr_rate * self._decay_intervals(k)
        return [low / divisor for low in self.min_lrs]

    def get_mom(self) -> list[tuple[float, float]] | None:
        """The betas of each group at the current position; None when the momentum is not cycled."""
        if not self.cycle_momentum:
            return None
        k = self.last_batch_iteration + 1
        if k == 0:
            moms = self.min_moms
        elif k < self.total_size:
            height = self._height(k)
            moms = [high - (high - low) * height for low, high in zip(self.min_moms, self.max_moms)]
        else:
            factor = 1.0 + self.decay_mom_rate * self._decay_intervals(k)
            moms = [high * factor for high in self.max_moms]
        return [(mom, self.SECOND_BETA) for mom in moms]

    def apply(self) -> None:
        super().apply()
        moms = self.get_mom()
        if moms is not None:
            for group, betas in zip(self.param_groups, moms):
                group["betas"] = betas
