# SPDX-License-Identifier: Apache-2.0
"""What all schedules share: the step counter, the writes into the optimizer's groups, and saving."""

from __future__ import annotations

import math
from typing import Any, Sequence


def get_torch_optimizer(optimizer: Any) -> Any:
    """The object whose ``param_groups`` carry the learning rate.

    Accepts a ``torch.optim.Optimizer`` or any wrapper around one that has ``.optimizer`` or ``.param_groups``.
    Raises ``TypeError`` for anything else.
    """
    inner = getattr(optimizer, "optimizer", None)
    if hasattr(inner, "param_groups"):
        return inner
    if hasattr(optimizer, "param_groups"):
        return optimizer
    raise TypeError(f"optimizer: {type(optimizer).__name__} is neither a torch.optim.Optimizer nor a wrapper of one")


def write_value(group: dict, key: str, value: float) -> None:
    """Write into a param group in place.

    A tensor learning rate (``capturable`` optimizers, compiled steps) must keep its identity, because the compiled
    graph holds the tensor and not the dict entry.
    """
    current = group.get(key)
    if hasattr(current, "fill_"):
        current.fill_(value)
    else:
        group[key] = value


def update_lr(param_groups: Sequence[dict], lrs: Sequence[float]) -> list[float]:
    """Write one learning rate into each group; returns the written values as floats."""
    if len(param_groups) != len(lrs):
        raise ValueError(f"lrs: {len(lrs)} values for {len(param_groups)} parameter groups")
    for group, lr in zip(param_groups, lrs):
        write_value(group, "lr", lr)
    return [float(group["lr"]) for group in param_groups]


def per_group(name: str, value: Any, groups: Sequence[dict]) -> list[float]:
    """Spread a scalar over the groups, or check that a list has one value per group."""
    if isinstance(value, (list, tuple)):
        if len(value) != len(groups):
            raise ValueError(f"{name}: {len(value)} values for {len(groups)} parameter groups; "
                             "give one number, or one per group")
        return [real(name, item) for item in value]
    return [real(name, value)] * len(groups)


def real(name: str, value: Any) -> float:
    """A finite number, or ``ValueError`` naming the argument."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name}: expected a number, got {value!r}") from None
    if isinstance(value, bool) or not math.isfinite(number):
        raise ValueError(f"{name}: expected a finite number, got {value!r}")
    return number


def whole(name: str, value: Any, *, at_least: int) -> int:
    """An integer; JSON's ``1e3`` counts as one. ``ValueError`` names the argument otherwise."""
    number = real(name, value)
    if number != int(number) or number < at_least:
        raise ValueError(f"{name}: expected a whole number of at least {at_least}, got {value!r}")
    return int(number)


class Schedule:
    """Base of the schedules.

    ``last_batch_iteration`` is the 0-based index of the last update whose rate was set; -1 before the first. The
    schedule is stepped once after each applied update. It writes into the optimizer's live ``param_groups`` (never a
    copy), so whoever shares those dicts sees the change.
    """

    def __init__(self, optimizer: Any, last_batch_iteration: int = -1) -> None:
        self.optimizer = get_torch_optimizer(optimizer)
        self.last_batch_iteration = whole("last_batch_iteration", last_batch_iteration, at_least=-1)
        self._last_lr: list[float] = self.group_lrs()

    # --- what a schedule defines -------------------------------------------------------------------------------------
    def lrs_at(self, t: int) -> list[float]:
        """Learning rate of each group for update ``t`` (0-based)."""
        raise NotImplementedError

    def initial_lrs(self) -> list[float]:
        """Learning rates before the first step."""
        return self.lrs_at(0)

    # --- what callers use --------------------------------------------------------------------------------------------
    @property
    def param_groups(self) -> list[dict]:
        return self.optimizer.param_groups

    def group_lrs(self) -> list[float]:
        return [float(group["lr"]) for group in self.param_groups]

    def get_lr(self) -> list[float]:
        """Rates that belong to the current position; the initial ones before the first step."""
        t = self.last_batch_iteration
        return self.initial_lrs() if t < 0 else self.lrs_at(t)

    def get_last_lr(self) -> list[float]:
        """Rates last written into the optimizer."""
        return list(self._last_lr)

    def step(self, last_batch_iteration: int | None = None) -> None:
        """Advance by one update, or jump to the given update index."""
        if last_batch_iteration is None:
            self.last_batch_iteration += 1
        else:
            self.last_batch_iteration = whole("last_batch_iteration", last_batch_iteration, at_least=-1)
        self.apply()

    def apply(self) -> None:
        """Write the current position's values into the optimizer."""
        self._last_lr = update_lr(self.param_groups, self.get_lr())

    def state_dict(self) -> dict:
        return {"last_batch_iteration": self.last_batch_iteration}

    def load_state_dict(self, state_dict: dict) -> None:
        """Continue from a saved position. The rate of that position is written at once, so that the next update
        uses it whether or not the optimizer's own state has been loaded."""
        if "last_batch_iteration" not in state_dict:
            raise ValueError(f"state_dict: no 'last_batch_iteration' in {sorted(state_dict)}")
        self.last_batch_iteration = whole("state_dict['last_batch_iteration']",
                                          state_dict["last_batch_iteration"],
                                          at_least=-1)
        self.apply()
