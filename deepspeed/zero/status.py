# SPDX-License-Identifier: Apache-2.0
"""States and kinds of a sharded parameter, by the names callers compare with."""
from enum import Enum


class ZeroParamStatus(Enum):
    AVAILABLE = 1      # the whole parameter is in place
    NOT_AVAILABLE = 2  # only this rank's slice exists
    INFLIGHT = 3       # being gathered


class ZeroParamType(Enum):
    NORMAL = 1
    PARTITIONED = 2
    REMOTE = 3


class DeepSpeedTensorOverride(Enum):
    dtype = 1
    device = 2
