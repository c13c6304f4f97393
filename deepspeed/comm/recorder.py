# SPDX-License-Identifier: Apache-2.0
"""What the collectives cost: how many, how large, how long. Off unless configured.

Calls of deepspeed.comm: times are host times around the call with the device drained at both ends; an asynchronous call is counted
and sized, and its time is that of issuing it. The engine's own collectives: summed in C++ by kind, phase and size, from issue to
completion, with the part during which a thread was blocked; on CUDA the host only issues them, and that is the time.
"""
import functools
import inspect
import time
from collections import defaultdict
from typing import NamedTuple

import torch
import torch.distributed as dist

from deepspeed.comm import flight
from deepspeed.comm.bandwidth import bandwidth
from deepspeed.device.select import get_accelerator
from deepspeed.telemetry.logs import log_dist, logger, print_dist
from deepspeed.telemetry.timers import trim_mean


class Cost(NamedTuple):
    seconds: float
    bytes: int
    asynchronous: bool
    ranks: int  # of the group


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
        if self.enabled != flight.state.tallying:
            flight.keep_tallies(bool(self.enabled))

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


def recorded(payload, check=None, detail=None):
    """Decorator of a collective: adds `prof`, `log_name` and `debug`, numbers the call in the flight record, and times it when the
    recorder wants it.

    All three are functions of the call's arguments. payload: the tensors whose bytes count. check: raises TypeError or ValueError
    on what cannot work. detail: text for the flight record, such as the other side of a send.
    """

    def decorate(function):
        own_name = function.__name__

        @functools.wraps(function)
        def call(*args, prof=False, log_name=None, debug=None, **kwargs):
            if check is not None:
                _refuse(function, check, args, kwargs)
            name = log_name or own_name
            group = kwargs.get("group")
            if group is None:
                group = next((value for value in args if isinstance(value, dist.ProcessGroup)), None)
            size = tensor_bytes(payload(*args, **kwargs))
            number = flight.begin(own_name, group, detail(*args, **kwargs) if detail is not None else "", size)
            work = None
            try:
                if not recorder.wants(name, prof):
                    work = function(*args, **kwargs)
                else:
                    work = _timed(function, args, kwargs, name, size, group, debug)
            except BaseException:
                flight.end(number, ok=False)
                raise
            flight.end(number, work, between_two=detail is not None)
            return work

        return call

    return decorate


def _refuse(function, check, args, kwargs):
    try:
        if dist.is_initialized():
            check(*args, **kwargs)
    except (TypeError, ValueError) as error:
        inspect.signature(function).bind(*args, **kwargs)  # a missing or unknown argument, said by Python
        raise type(error)(f"{function.__name__}: {error}") from None


def _timed(function, args, kwargs, name, size, group, debug):
    device = get_accelerator()
    device.synchronize()
    begin_s = time.perf_counter()
    work = function(*args, **kwargs)
    asynchronous = work is not None and hasattr(work, "wait")
    if not asynchronous:
        device.synchronize()
    cost = Cost(time.perf_counter() - begin_s, size, asynchronous, dist.get_world_size(group))
    recorder.record(name, cost, debug if recorder.debug else None)
    return work


# ------------------------------------------------------------------------------------------------------------ asking
def configure(deepspeed_config=None, enabled=None, prof_all=None, prof_ops=None, verbose=None, debug=None):
    """Sets what is recorded: from a configuration's `comms_logger` section, then from the arguments that are not None."""
    recorder.configure(deepspeed_config, enabled, prof_all, prof_ops, verbose, debug)


def reset_log():
    recorder.reset()
    flight.keep_tallies(bool(recorder.enabled))


def has_comm_data():
    return any(recorder.costs.values())


def get_logged_comm_ops():
    """Names of the operations of deepspeed.comm recorded so far."""
    return list(recorder.costs)


def get_comm_operation_count():
    """Number of calls of deepspeed.comm recorded so far."""
    return sum(len(costs) for sizes in recorder.costs.values() for costs in sizes.values())


def _row(operation, size_bytes, count, total_s, mean_s, ranks):
    rate = bandwidth(operation, size_bytes, mean_s, ranks)
    return {"count": count, "total_latency_ms": total_s * 1e3, "avg_latency_ms": mean_s * 1e3, "tput_avg_gbps": rate.algorithm_gbps,
            "busbw_avg_gbps": rate.bus_gbps, "total_bytes": count * size_bytes}


def _called():
    """{operation: {message bytes: row}} of the calls of deepspeed.comm."""
    table = {}
    for name, sizes in recorder.costs.items():
        table[name] = {}
        for size, costs in sorted(sizes.items()):
            seconds = [cost.seconds for cost in costs]
            table[name][size] = _row(name, size, len(costs), sum(seconds), trim_mean(seconds, 0.1), costs[0].ranks)
    return table


def _of_engine():
    """The same for the engine's own: {"phase: kind": {message bytes: row}}; rows also have "waited_ms", the blocked part."""
    table = {}
    for label, ranks, ledger in flight.engine_ledgers():
        for tally in ledger.tallies():
            name = f"{tally['phase'] or label}: {tally['kind']}"
            if not (recorder.prof_all or tally["kind"] in recorder.prof_ops or tally["phase"] in recorder.prof_ops):
                continue
            rows = table.setdefault(name, {})
            row = rows.get(tally["bytes"])
            count, total_s = tally["number"], tally["seconds"]
            waited_ms = tally["waited_s"] * 1e3
            if row is not None:  # several transports: the groups of several engines
                count, total_s, waited_ms = count + row["count"], total_s + row["total_latency_ms"] / 1e3, waited_ms + row["waited_ms"]
            rows[tally["bytes"]] = dict(_row(tally["kind"], tally["bytes"], count, total_s, total_s / count, ranks), waited_ms=waited_ms)
    return table


def _add_waiting(tables):
    """Adds to each row how much longer this rank was in it than the fastest rank: the time spent waiting for stragglers."""
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, [{name: {size: row["total_latency_ms"] for size, row in rows.items()}
                                       for name, rows in table.items()} for table in tables])
    for index, table in enumerate(tables):
        for name, rows in table.items():
            for size, row in rows.items():
                times_ms = [other[index][name][size] for other in everyone if size in other[index].get(name, {})]
                row["straggler_ms"] = row["total_latency_ms"] - min(times_ms)
                # Who kept the others waiting comes last, and so is in the collective for the shortest time.
                row["straggler_rank"] = next(r for r, other in enumerate(everyone)
                                             if other[index].get(name, {}).get(size) == min(times_ms))


_COLUMNS = (("count", "count", "{:d}"), ("total_bytes", "total MB", "{:.2f}"), ("total_latency_ms", "total ms", "{:.2f}"),
            ("avg_latency_ms", "mean ms", "{:.3f}"), ("waited_ms", "blocked ms", "{:.2f}"), ("tput_avg_gbps", "Gbit/s", "{:.2f}"),
            ("busbw_avg_gbps", "bus Gbit/s", "{:.2f}"), ("straggler_ms", "waiting ms", "{:.2f}"), ("straggler_rank", "for rank", "{:d}"))


def _as_lines(title, table):
    rows = [row for sizes in table.values() for row in sizes.values()]
    columns = [column for column in _COLUMNS if any(column[0] in row for row in rows)]
    width = max(34, *(len(name) + 2 for name in table))
    lines = [title, f"{'operation':<{width}}{'bytes':>12}" + "".join(f"{heading:>12}" for _, heading, _ in columns)]
    for name, sizes in table.items():
        for size, row in sorted(sizes.items()):
            cells = [form.format(row[key] / 1e6 if key == "total_bytes" else row[key]) for key, _, form in columns]
            lines.append(f"{name:<{width}}{size:>12}" + "".join(f"{cell:>12}" for cell in cells))
    return lines


def log_summary(show_straggler=False, return_dict=False):
    """Prints on rank 0 what was recorded on it, a line per operation and size. Collective if `show_straggler`.

    Bandwidths are those of deepspeed.comm.bandwidth. "waiting ms" is how much longer this rank was in the operation than the rank
    that was in it for the shortest time, and that came last: "for rank". return_dict: also return {"summary": {operation: {message
    bytes: row}}, "engine": the same for the engine's own collectives}, on every rank.
    """
    called, engine = _called(), _of_engine()
    if show_straggler:
        recording, recorder.enabled = recorder.enabled, False  # this exchange is not the caller's
        try:
            _add_waiting([called, engine])
        finally:
            recorder.enabled = recording
    if not called and not engine:
        logger.warning("log_summary: no collective was recorded; enable comms_logger first")
    lines = []
    if called:
        lines += _as_lines("deepspeed.comm:", called)
    if engine:
        lines += _as_lines("the engine's own:", engine)
    if lines:
        print_dist("\n".join(lines), ranks=[0])
    return {"summary": called, "engine": engine} if return_dict else None
