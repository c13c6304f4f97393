# SPDX-License-Identifier: Apache-2.0
"""How difficult the data may be at each step (curriculum learning; Li et al. 2022, arXiv 2108.06084)."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable
from typing import Any

from deepspeed.telemetry import logger

_NEEDS = {
    "fixed_linear": ("total_curriculum_step", "difficulty_step"),
    "fixed_root": ("total_curriculum_step", "difficulty_step", "root_degree"),
    "fixed_discrete": ("difficulty", "max_step"),
    "custom": (),
}


def _require(config: Any, names: tuple[str, ...], where: str) -> list:
    missing = [name for name in names if config is None or config.get(name) is None]
    if missing:
        raise ValueError(f"curriculum: {where} lacks {', '.join(missing)}")
    return [config[name] for name in names]


def _check_growth(schedule: Any, first: float, last: float, root: bool) -> None:
    for name, least in (("total_curriculum_step", 1), ("difficulty_step", 1), *([("root_degree", 1)] if root else [])):
        if schedule[name] < least:
            raise ValueError(f"curriculum: schedule_config.{name}: found {schedule[name]}; allowed: at least {least}")
    end = growing_value(schedule["total_curriculum_step"], first, last, schedule["total_curriculum_step"], schedule["difficulty_step"])
    if end < last:
        logger.warning_once(f"curriculum: max_difficulty {last} is no multiple of schedule_config.difficulty_step "
                            f"{schedule['difficulty_step']}: the schedule ends at {end} and never reaches it")


def whole(value: float) -> float:
    """8.0 as 8: difficulties are often lengths, and lengths index tensors."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def growing_value(step: int, first: float, last: float, total_steps: int, multiple: int, root_degree: int = 1) -> int:
    """``first + (last - first) * (step / total_steps) ** (1 / root_degree)``, rounded down to a multiple and kept between the first
    multiple that is not below `first`, and `last`."""
    share = min(max(step, 0) / total_steps, 1.0)
    value = math.floor(first + (last - first) * share**(1.0 / root_degree))
    value -= value % multiple
    return min(max(value, math.ceil(first / multiple) * multiple), last)


class CurriculumScheduler:
    """The difficulty at a step, counted from 1.

    config: min_difficulty, max_difficulty, schedule_type, schedule_config, in which
        fixed_linear needs total_curriculum_step and difficulty_step,
        fixed_root also root_degree,
        fixed_discrete difficulty (a list) and max_step (the last step of each difficulty but the last),
        custom nothing, but ``set_custom_get_difficulty``.
    Once max_difficulty has been reached, it stays.
    """

    def __init__(self, config: Any) -> None:
        first, last, kind = _require(config, ("min_difficulty", "max_difficulty", "schedule_type"), "the section")
        if kind not in _NEEDS:
            raise RuntimeError(f"curriculum: schedule_type: found {kind!r}; allowed: {', '.join(_NEEDS)}")
        schedule = config.get("schedule_config")
        _require(schedule, _NEEDS[kind], f"schedule_config of {kind}")
        if kind in ("fixed_linear", "fixed_root"):
            _check_growth(schedule, first, last, kind == "fixed_root")
        if kind == "fixed_discrete" and len(schedule["difficulty"]) != len(schedule["max_step"]) + 1:
            raise ValueError(
                f"curriculum: schedule_config.difficulty has {len(schedule['difficulty'])} items; allowed: one more than max_step, "
                f"which has {len(schedule['max_step'])}")
        self.custom_get_difficulty: Callable[[int], float] | None = None
        self.state = {
            "min_difficulty": whole(first),
            "max_difficulty": whole(last),
            "current_difficulty": whole(first),
            "schedule_type": kind,
            "schedule_config": {name: value for name, value in dict(schedule or {}).items() if value is not None},
        }

    def set_custom_get_difficulty(self, schedule_function: Callable[[int], float]) -> None:
        """schedule_function(step) -> difficulty; for schedule_type custom."""
        self.custom_get_difficulty = schedule_function

    def get_difficulty(self, global_steps: int) -> float:
        """What the schedule says for a step, whatever the current difficulty is."""
        state, schedule = self.state, self.state["schedule_config"]
        kind = state["schedule_type"]
        if kind == "custom":
            if self.custom_get_difficulty is None:
                raise RuntimeError("curriculum: schedule_type is custom, but no function was set: call "
                                   "engine.set_custom_curriculum_learning_schedule() before training")
            return whole(self.custom_get_difficulty(global_steps))
        if kind == "fixed_discrete":
            return schedule["difficulty"][bisect_left(schedule["max_step"], global_steps)]
        return growing_value(global_steps, state["min_difficulty"], state["max_difficulty"], schedule["total_curriculum_step"],
                             schedule["difficulty_step"], schedule["root_degree"] if kind == "fixed_root" else 1)

    def update_difficulty(self, global_steps: int) -> float:
        """Moves to a step; returns the difficulty there."""
        if self.state["current_difficulty"] < self.state["max_difficulty"]:
            self.state["current_difficulty"] = self.get_difficulty(global_steps)
        return self.state["current_difficulty"]

    def get_current_difficulty(self) -> float:
        return self.state["current_difficulty"]

    def set_current_difficulty(self, difficulty: float) -> None:
        self.state["current_difficulty"] = difficulty

    def get_state(self) -> dict:
        return self.state

    def set_state(self, state: dict) -> None:
        self.state = state

    def state_dict(self) -> dict:
        """The current difficulty; the schedule itself is the configuration's."""
        return {"current_difficulty": self.state["current_difficulty"]}

    def load_state_dict(self, state_dict: dict) -> None:
        self.state["current_difficulty"] = state_dict["current_difficulty"]
