# SPDX-License-Identifier: Apache-2.0
"""Algorithm and bus bandwidth of a collective.

Algorithm bandwidth is the size of the message divided by the time. Bus bandwidth is what each rank's link carries: a ring moves
(n - 1) / n of the message over it for a gather, a scatter or an exchange, twice that for an all-reduce, so it can be compared with
the hardware's figure whatever the number of ranks (the definitions of NVIDIA's nccl-tests, PERFORMANCE.md).
"""
from typing import NamedTuple

_FACTORS = (  # first match; the rest (broadcast, reduce, send, ...) moves the message once
    (("all_reduce", "inference_all_reduce"), lambda n: 2 * (n - 1) / n),
    (("all_gather", "allgather", "reduce_scatter", "all_to_all", "gather", "scatter"), lambda n: (n - 1) / n),
)


class Bandwidth(NamedTuple):
    algorithm_gbps: float  # 1e9 bits a second
    bus_gbps: float


def bus_factor(operation, ranks):
    """Share of the message (the full size: all ranks' parts of a gather or scatter) that crosses each rank's link."""
    for names, factor in _FACTORS:
        if operation.startswith(names):
            return factor(ranks)
    return 1.0


def bandwidth(operation, size_bytes, seconds, ranks):
    if seconds <= 0:
        return Bandwidth(0.0, 0.0)
    algorithm = size_bytes * 8 / seconds / 1e9
    return Bandwidth(algorithm, algorithm * bus_factor(operation, ranks))
