# SPDX-License-Identifier: Apache-2.0
"""Names for where state rests and for kinds of state, as callers pass them to offload_states()."""
from enum import Enum


class OffloadDeviceEnum(str, Enum):
    none = "none"
    cpu = "cpu"
    nvme = "nvme"


class OffloadStateTypeEnum(str, Enum):
    optim_states = "optim_states"
    hp_params = "hp_params"
    lp_params = "lp_params"
    lp_grads = "lp_grads"
    contiguous_grad_buffer = "contiguous_grad_buffer"


# What backward reads and adds to.
FOR_BACKWARD = ("lp_params", "lp_grads", "contiguous_grad_buffer")
