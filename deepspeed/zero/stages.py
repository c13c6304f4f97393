# SPDX-License-Identifier: Apache-2.0
"""The ZeRO stages by name, for callers and for checkpoints that pickle them."""
from enum import IntEnum


class ZeroStageEnum(IntEnum):
    disabled = 0
    optimizer_states = 1
    gradients = 2
    weights = 3
    max_stage = 3
