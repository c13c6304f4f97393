# SPDX-License-Identifier: Apache-2.0
"""How a reduction combines values. torch's own ReduceOp is accepted wherever this one is."""
from enum import Enum

import torch.distributed as dist


class ReduceOp(Enum):
    SUM = 0
    PRODUCT = 1
    MIN = 2
    MAX = 3
    BAND = 4
    BOR = 5
    BXOR = 6
    AVG = 7
    UNUSED = 8


def to_torch(op):
    """torch's ReduceOp for ours or its own."""
    if isinstance(op, ReduceOp):
        if op is ReduceOp.UNUSED:
            raise ValueError("ReduceOp.UNUSED names no reduction")
        return getattr(dist.ReduceOp, op.name)
    return op
