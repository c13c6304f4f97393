# SPDX-License-Identifier: Apache-2.0
"""Learning-rate schedules: the five that a JSON config can name, and the factory that also builds torch's."""

from .arguments import (add_tuning_arguments, get_config_from_args, get_lr_from_config, parse_arguments)
from .factory import SCHEDULES, VALID_LR_SCHEDULES, build_scheduler
from .one_cycle import OneCycle
from .range_test import LRRangeTest
from .schedule import Schedule, get_torch_optimizer, update_lr
from .warmup import WarmupCosineLR, WarmupDecayLR, WarmupLR

__all__ = [
    "LRRangeTest", "OneCycle", "SCHEDULES", "Schedule", "VALID_LR_SCHEDULES", "WarmupCosineLR", "WarmupDecayLR",
    "WarmupLR", "add_tuning_arguments", "build_scheduler", "get_config_from_args", "get_lr_from_config",
    "get_torch_optimizer", "parse_arguments", "update_lr"
]
