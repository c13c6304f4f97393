# SPDX-License-Identifier: Apache-2.0
"""Schedules from the command line, for scripts that tune them there."""

from __future__ import annotations

import argparse
from collections.abc import Mapping

from .factory import VALID_LR_SCHEDULES

_WARMUP = ("warmup_num_steps", "warmup_type")
_WARMUP_LR = ("warmup_min_lr", "warmup_max_lr", *_WARMUP)
_FIELDS = {
    "LRRangeTest": ("lr_range_test_min_lr", "lr_range_test_step_rate", "lr_range_test_step_size",
                    "lr_range_test_staircase"),
    "OneCycle": ("cycle_first_step_size", "cycle_first_stair_count", "cycle_second_step_size",
                 "cycle_second_stair_count", "decay_step_size", "cycle_min_lr", "cycle_max_lr", "decay_lr_rate",
                 "cycle_momentum", "cycle_min_mom", "cycle_max_mom", "decay_mom_rate"),
    "WarmupLR": _WARMUP_LR,
    "WarmupDecayLR": ("total_num_steps", *_WARMUP_LR),
    "WarmupCosineLR": ("total_num_steps", "warmup_min_ratio", "cos_min_ratio", *_WARMUP),
}
# On the command line -1 stands for "not given", which these fields have as a meaningful state.
_UNSET_WHEN_NEGATIVE = ("cycle_first_stair_count", "cycle_second_step_size", "cycle_second_stair_count")


def add_tuning_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add ``--lr_schedule`` and a flag for every field of every schedule; returns the parser."""
    group = parser.add_argument_group("Learning-rate schedule")
    add = group.add_argument
    add("--lr_schedule", type=str, default=None, help=f"schedule: {', '.join(VALID_LR_SCHEDULES)}")
    add("--lr_range_test_min_lr", type=float, default=0.001, help="first rate of the range test")
    add("--lr_range_test_step_rate", type=float, default=1.0, help="growth of the rate per interval")
    add("--lr_range_test_step_size", type=int, default=1000, help="updates in an interval")
    add("--lr_range_test_staircase", action="store_true", help="raise the rate only at whole intervals")
    add("--cycle_first_step_size", type=int, default=1000, help="updates from minimum to maximum")
    add("--cycle_first_stair_count", type=int, default=-1, help="levels on the way up; -1: continuous")
    add("--cycle_second_step_size", type=int, default=-1, help="updates back to the minimum; -1: as many as up")
    add("--cycle_second_stair_count", type=int, default=-1, help="levels on the way down; -1: as many as up")
    add("--decay_step_size", type=int, default=1000, help="updates in a decay interval after the cycle")
    add("--cycle_min_lr", type=float, default=0.01, help="rate at both ends of the cycle")
    add("--cycle_max_lr", type=float, default=0.1, help="rate at the top of the cycle")
    add("--decay_lr_rate", type=float, default=0.0, help="fall of the rate per decay interval")
    add("--cycle_momentum", action="store_true", help="move the momentum against the rate")
    add("--cycle_min_mom", type=float, default=0.8, help="momentum at the top of the cycle")
    add("--cycle_max_mom", type=float, default=0.9, help="momentum at both ends of the cycle")
    add("--decay_mom_rate", type=float, default=0.0, help="growth of the momentum per decay interval")
    add("--warmup_min_lr", type=float, default=0, help="rate at the start of the warm-up")
    add("--warmup_max_lr", type=float, default=0.001, help="rate after the warm-up")
    add("--warmup_num_steps", type=int, default=1000, help="updates in the warm-up")
    add("--warmup_type", type=str, default="log", help="shape of the warm-up: log or linear")
    add("--warmup_min_ratio", type=float, default=0.01, help="share of the rate at the start (WarmupCosineLR)")
    add("--cos_min_ratio", type=float, default=0.01, help="share of the rate at the end (WarmupCosineLR)")
    add("--total_num_steps", type=int, default=None, help="updates in all (WarmupDecayLR, WarmupCosineLR)")
    return parser


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    """Parse the process's own command line; returns (known arguments, the rest)."""
    return add_tuning_arguments(argparse.ArgumentParser()).parse_known_args()


def get_config_from_args(args: argparse.Namespace) -> tuple[dict | None, str | None]:
    """A ``scheduler`` section from parsed flags: (section, None), or (None, why not)."""
    name = getattr(args, "lr_schedule", None)
    if name is None:
        return None, "--lr_schedule not specified on command line"
    if name not in _FIELDS:
        return None, f"{name} is not supported LR schedule (allowed: {', '.join(VALID_LR_SCHEDULES)})"
    params = {field: getattr(args, field) for field in _FIELDS[name]}
    for field in _UNSET_WHEN_NEGATIVE:
        if params.get(field, 0) < 0:
            del params[field]
    if params.get("total_num_steps", 0) is None:
        del params["total_num_steps"]
    return {"type": name, "params": params}, None


def get_lr_from_config(config: Mapping | None) -> tuple[float | None, str]:
    """The rate that a ``scheduler`` section aims at, for building an optimizer: (rate, "") or (None, why not)."""
    config = config or {}
    if "type" not in config:
        return None, "LR schedule type not defined in config"
    if "params" not in config:
        return None, "LR schedule params not defined in config"
    name, params = config["type"], config["params"]
    if name not in VALID_LR_SCHEDULES:
        return None, f"{name} is not a valid LR schedule"
    if name == "WarmupCosineLR":
        return None, "WarmupCosineLR scales the optimizer's own rate, its params hold none"
    key = {"LRRangeTest": "lr_range_test_min_lr", "OneCycle": "cycle_max_lr"}.get(name, "warmup_max_lr")
    if params.get(key) is None:
        return None, f"{key} not defined in the params of {name}"
    return params[key], ""
