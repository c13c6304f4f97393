# SPDX-License-Identifier: Apache-2.0
"""What the collectives called through deepspeed.comm cost: how many, how large, how long. Off unless configured.

Times are host times around the call with the device drained at both ends; an asynchronous call is counted and sized, and
its time is that of issuing it.
"""
import functools
import time
from collections import defaultdict
from typing import NamedTuple

import torch
import torch.distributed as dist

from deepspeed.device.select import get_accelerator
from deepspeed.telemetry.logs import log_dist, logger, print_dist
from deepspeed.telemetry.timers import trim_mean


class Cost(NamedTuple):
    seconds: float
    bytes: int
    asynchronous: bool


class CommsRecorder:
    def __init__(self):
        self.enabled = False
        self.prof_all = True
        self.prof_ops = []
        self.verbose = False
        self.debug = False
        self.reset()

    def reset(self):
        self.costs = defaultdict(lambda: defaultdict(list))  # operation -> message bytes -> [Cost]

    def configure(self, config=None, enabled=None, prof_all=None, prof_ops=None, verbose=None, debug=None):
        """Takes the `comms_logger` section of a configuration, then the arguments that are given."""
        section = getattr(config, "comms_logger", None) or getattr(getattr(config, "comms_config", None), "comms_logger", None)
        if section is None and isinstance(config, dict):
            section = config.get("comms_logger")
        given = dict(enabled=enabled, prof_all=prof_all, prof_ops=prof_ops, verbose=verbose, debug=debug)
        for key, value in given.items():
            if value is None and section is not None:
                value = section.get(key) if isinstance(section, dict) else getattr(section, key, None)
            if value is not None:
                setattr(self, key, value)

    def wants(self, name, prof):
        return self.enabled and (prof or self.prof_all or name in self.prof_ops)

    def record(self, name, cost, caller=None):
        self.costs[name][cost.bytes].append(cost)
        if self.verbose:
            log_dist(f"comm op: {name}{' from ' + caller if caller else ''} | time (ms): {cost.seconds * 1e3:.2f} | bytes: {cost.bytes}"
                     f"{' | asynchronous' if cost.asynchronous else ''}", ranks=[-1])


recorder = CommsRecorder()


def tensor_bytes(values):
    """Bytes of all tensors in a tensor or a nested list of them."""
    if isinstance(values, torch.Tensor):
        return values.numel() * values.element_size()
    if isinstance(values, (list, tuple)):
        return sum(tensor_bytes(value) for value in values)
    return 0


def recorded(payload):
    """Decorator of a collective: adds `prof`, `log_name` and `debug`, and records the call when the recorder wants it.

    payload: function of the call's arguments that gives the tensors whose bytes count.
    """

    def decorate(function):
        @functools.wraps(function)
        def call(*args, prof=False, log_name=None, debug=None, **kwargs):
            name = log_name or function.__name__
            if not recorder.wants(name, prof):
                return function(*args, **kwargs)
            device = get_accelerator()
            device.synchronize()
            begin_s = time.perf_counter()
            work = function(*args, **kwargs)
            asynchronous = work is not None and hasattr(work, "wait")
            if not asynchronous:
                device.synchronize()
            cost = Cost(time.perf_counter() - begin_s, tensor_bytes(payload(*args, **kwargs)), asynchronous)
            recorder.record(name, cost, debug if recorder.debug else None)
            return work

        return call

    return decorate


# ------------------------------------------------------------------------------------------------------------ asking
def configure(deepspeed_config=None, enabled=None, prof_all=None, prof_ops=None, verbose=None, debug=None):
    """Sets what is recorded: from a configuration's `comms_logger` section, then from the arguments that are not None."""
    recorder.configure(deepspeed_config, enabled, prof_all, prof_ops, verbose, debug)


def reset_log():
    recorder.reset()


def has_comm_data():
    return any(recorder.costs.values())


def get_logged_comm_ops():
    """Names of the operations recorded so far."""
    return list(recorder.costs)


def get_comm_operation_count():
    """Number of calls recorded so far."""
    return sum(len(costs) for sizes in recorder.costs.values() for costs in sizes.values())


def _table():
    """{operation: {message bytes: {count, total_ms, mean_ms, algorithm bytes per second}}}"""
    table = {}
    for name, sizes in recorder.costs.items():
        table[name] = {}
        for size_bytes, costs in sorted(sizes.items()):
            times_ms = [cost.seconds * 1e3 for cost in costs]
            mean_ms = trim_mean(times_ms, 0.1)
            table[name][size_bytes] = {
                "count": len(costs), "total_latency_ms": sum(times_ms), "avg_latency_ms": mean_ms,
                "throughput_gbps": size_bytes * 8 / (mean_ms * 1e6) if mean_ms > 0 else 0.0,
            }
    return table


def _add_waiting(table):
    """Adds to each row how much longer this rank was in it than the fastest rank: the time spent waiting for others."""
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, {name: {size: row["total_latency_ms"] for size, row in rows.items()}
                                      for name, rows in table.items()})
    for name, rows in table.items():
        for size, row in rows.items():
            shortest_ms = min(other[name][size] for other in everyone if size in other.get(name, {}))
            row["straggler_ms"] = row["total_latency_ms"] - shortest_ms


def log_summary(show_straggler=False, return_dict=False):
    """Prints on rank 0 what was recorded on it, a line per operation and size. Collective if `show_straggler`.

    return_dict: also return {"summary": {operation: {message bytes: row}}}.
    """
    table = _table()
    if show_straggler:
        _add_waiting(table)
    if not table:
        logger.warning("log_summary: no collective was recorded; enable comms_logger first")
    lines = [f"{'operation':<28}{'bytes':>14}{'count':>8}{'total ms':>12}{'mean ms':>10}{'Gbit/s':>10}"
             + (f"{'waiting ms':>12}" if show_straggler else "")]
    for name, rows in table.items():
        for size, row in rows.items():
            line = (f"{name:<28}{size:>14}{row['count']:>8}{row['total_latency_ms']:>12.2f}{row['avg_latency_ms']:>10.3f}"
                    f"{row['throughput_gbps']:>10.2f}")
            lines.append(line + (f"{row['straggler_ms']:>12.2f}" if show_straggler else ""))
    print_dist("\n".join(lines), ranks=[0])
    return {"summary": table} if return_dict else None
