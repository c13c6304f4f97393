# SPDX-License-Identifier: Apache-2.0
"""How many tokens the layers that drop some keep at each step."""

from __future__ import annotations

from typing import Any

from .curriculum import growing_value


class RandomLTDScheduler:
    """Tokens kept per sequence, growing linearly from min_value to max_value.

    config: `data_efficiency.data_routing.random_ltd` (total_layer_num, random_ltd_layer_num, random_ltd_schedule), and
    `global_batch_size`, the sequences of one step over all ranks, for counting tokens.
    """

    def __init__(self, config: Any) -> None:
        schedule = config["random_ltd_schedule"]
        if schedule["schedule_type"] != "fixed_linear":
            raise RuntimeError(f"random_ltd_schedule.schedule_type: found {schedule['schedule_type']!r}; allowed: 'fixed_linear'")
        if schedule["min_value"] > schedule["max_value"]:
            raise ValueError(f"random_ltd_schedule.min_value: found {schedule['min_value']}, above max_value, {schedule['max_value']}")
        self.min_value, self.max_value = schedule["min_value"], schedule["max_value"]
        self.require_steps = schedule["schedule_config"]["require_steps"]
        self.seq_per_step = schedule["schedule_config"]["seq_per_step"]
        self.model_layer_num, self.random_ltd_layer_num = config["total_layer_num"], config["random_ltd_layer_num"]
        self.global_batch_size = config["global_batch_size"]
        self.reset_to_init()

    def reset_to_init(self) -> None:
        """As if no step had been made."""
        self.current_value = self.min_value
        self.consumed_layer_tokens = 0
        self.current_steps = -1

    def get_value(self, global_steps: int) -> int:
        """Tokens kept at a step, counted from 0."""
        return growing_value(global_steps, self.min_value, self.max_value, self.require_steps, self.seq_per_step)

    def get_current_seq(self) -> int:
        return self.current_value

    def set_current_seq(self, seq_length: int) -> None:
        self.current_value = seq_length

    def get_random_ltd_layer_num(self) -> int:
        return self.random_ltd_layer_num

    def _layer_tokens(self, kept: int) -> int:
        """Tokens that one step sends through layers, summed over the layers, if sequences have max_value tokens."""
        full = self.model_layer_num - self.random_ltd_layer_num
        return self.global_batch_size * (self.random_ltd_layer_num * kept + full * self.max_value)

    def get_total_layer_tokens(self, train_iters: int) -> int:
        """What the first `train_iters` steps consume. Changes nothing."""
        return sum(self._layer_tokens(self.get_value(step)) for step in range(train_iters))

    def update_seq(self, global_steps: int) -> None:
        """Moves to a step; calling it again for the same step does nothing."""
        if global_steps == self.current_steps:
            return
        if self.current_value < self.max_value:
            self.current_value = self.get_value(global_steps)
        self.consumed_layer_tokens += self._layer_tokens(self.current_value)
        self.current_steps = global_steps

    def state_dict(self) -> dict:
        names = ("consumed_layer_tokens", "current_steps", "current_value", "min_value", "max_value")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state_dict: dict) -> None:
        for name in ("consumed_layer_tokens", "current_steps", "current_value", "min_value", "max_value"):
            setattr(self, name, state_dict[name])

    get_state, set_state = state_dict, load_state_dict
