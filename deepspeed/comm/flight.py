# SPDX-License-Identifier: Apache-2.0
"""What this rank has done in collectives lately, and which it is in: the flight record.

Note [Names and numbers]: the engine's collectives are numbered by the ledger of their transport, in C++; those called through
deepspeed.comm by a ledger for each process group, here. `order` counts, within a group, what all its ranks must do in the same
order: ranks with the same order and another collective disagree. Sends, receives and gathers over shared memory need no common order and have order 0.
"""
import json
import os
import socket
import tempfile
import threading
import time
import weakref
from collections import deque

import torch.distributed as dist

from deepspeed._native import lib
from deepspeed.comm.stacks import all_stacks

KEPT_IN_REPORT = 32
_BETWEEN_TWO = ("send", "recv", "isend", "irecv", "batch_isend_irecv")


class GroupLog:
    """The calls of deepspeed.comm on one process group."""

    def __init__(self, group):
        self.name = group.group_name
        self.ranks = dist.get_process_group_ranks(group)
        self.ledger = lib().Ledger()

    @property
    def label(self):
        everyone = dist.is_initialized() and len(self.ranks) == dist.get_world_size()
        return "deepspeed.comm" if everyone else f"deepspeed.comm, group {self.name}"


class _State:
    def __init__(self):
        self.logs = {}                     # group name -> GroupLog
        self.labels = {}                   # transport id -> (what for, global ranks)
        self.open = {}                     # thread -> (GroupLog, number, since): synchronous calls under way
        self.pending = deque(maxlen=256)   # (GroupLog, number, since, weak reference to the work)
        self.step = -1
        self.tallying = False
        self.trace_limit = 0


state = _State()


def forget():
    """The world ends: its groups and their names go."""
    state.__init__()


def name_transport(transport, purpose, ranks):
    """Says what a transport is for, and the global ranks that it joins, in its order."""
    state.labels[transport.id] = (purpose, list(ranks))
    transport.ledger.keep_tallies(state.tallying)
    transport.ledger.keep_trace(state.trace_limit)


def _log_of(group):
    group = dist.group.WORLD if group is None else group
    name = group.group_name
    log = state.logs.get(name)
    if log is None:
        log = state.logs[name] = GroupLog(group)
        log.ledger.keep_tallies(state.tallying)
        log.ledger.keep_trace(state.trace_limit)
    return log


# ---------------------------------------------------------------------------------------------- calls of deepspeed.comm
def begin(kind, group, detail, size_bytes):
    """A call starts; returns what `end` wants. None where this process is not in the group."""
    if not dist.is_initialized() or group is dist.GroupMember.NON_GROUP_MEMBER:
        return None
    log = _log_of(group)
    number = log.ledger.begin(kind, detail, size_bytes, state.step, kind not in _BETWEEN_TWO)
    state.open[threading.get_ident()] = (log, number, time.time())
    return log, number


def end(call, work=None, ok=True, between_two=False):
    """The call has returned; `work` is what an asynchronous one returned, to be completed later.

    An isend or irecv may rightly stay open for long, and counts as done."""
    if call is None:
        return
    log, number = call
    _, _, since_s = state.open.pop(threading.get_ident(), (None, None, time.time()))
    if ok and hasattr(work, "is_completed") and not isinstance(work, list) and not between_two:
        settle_pending()
        state.pending.append((log, number, since_s, weakref.ref(work)))
    else:
        log.ledger.end(number, ok)


def settle_pending():
    """Notes which asynchronous calls have completed (or were dropped by the caller)."""
    while state.pending:
        log, number, _, reference = state.pending[0]
        work = reference()
        if work is not None and not work.is_completed():
            return
        log.ledger.end(number)
        state.pending.popleft()


# ------------------------------------------------------------------------------------------------------------ looking
def _groups():
    """(key that is equal on all its ranks, label, global ranks, ledger) of everything that is numbered."""
    for transport in lib().transports():
        purpose, ranks = state.labels.get(transport.id, ("transport", list(range(transport.size))))
        if len(ranks) > 1:
            yield f"{purpose}/{transport.id}/{ranks}", f"{purpose} over {transport.name}", ranks, transport.ledger
    for log in list(state.logs.values()):
        yield f"comm/{log.name}/{log.ranks}", log.label, log.ranks, log.ledger


def ledgers():
    """(label, ledger) of everything that is numbered."""
    return [(label, ledger) for _, label, _, ledger in _groups()]


def engine_ledgers():
    """(label, number of ranks, ledger) of the transports."""
    return [(label, len(ranks), ledger) for key, label, ranks, ledger in _groups() if not key.startswith("comm/")]


def keep_tallies(on):
    state.tallying = on
    for _, ledger in ledgers():
        ledger.keep_tallies(on)


def keep_trace(limit):
    state.trace_limit = limit
    for _, ledger in ledgers():
        ledger.keep_trace(limit)


def waits():
    """The collectives that threads of this rank are blocked in: [{"group", "label", "ranks", "since_s", **record}]."""
    settle_pending()
    blocked = {}
    for log, number, since_s in list(state.open.values()):
        blocked.setdefault(id(log.ledger), []).append((number, since_s))
    for log, number, since_s, _ in list(state.pending):
        if log.ledger is not None:
            blocked.setdefault(id(log.ledger), []).append((number, since_s))
    found = []
    for key, label, ranks, ledger in _groups():
        known = [(record, since_s) for record, since_s in ledger.blocked()]
        numbers = dict(blocked.get(id(ledger), []))
        if numbers:
            known += [(record, numbers[record["seq"]]) for record in ledger.recent() if record["seq"] in numbers]
        for record, since_s in known:
            found.append(dict(record, group=key, label=label, ranks=ranks, since_s=since_s))
    return found


def events():
    """A number that grows with every collective of this rank that starts or ends."""
    settle_pending()
    return sum(ledger.events for _, ledger in ledgers())


def who():
    """Who this rank is: {"rank", "world_size", "host", "pid", "start_ticks"}."""
    with open("/proc/self/stat") as stat:
        ticks = int(stat.read().rpartition(")")[2].split()[19])
    return {"rank": dist.get_rank(), "world_size": dist.get_world_size(), "host": socket.gethostname(), "pid": os.getpid(),
            "start_ticks": ticks}


def snapshot(me, reason, kept=None):
    """This rank as a dict for JSON: who it is, its collectives by group (the last `kept` of at most 256), its Python stacks."""
    groups = [{"group": key, "label": label, "ranks": ranks, "records": ledger.recent()[-kept if kept else 0:]}
              for key, label, ranks, ledger in _groups()]
    return dict(me, reason=reason, time_s=time.time(), step=state.step, waits=waits(), groups=groups, stacks=all_stacks())


def default_folder():
    """Where flight records go unless hang_detection.flight_record says otherwise."""
    return os.path.join(tempfile.gettempdir(), f"deepspeed_flight_record_{os.getuid()}")


def write(folder, record):
    """Writes the record to folder/rank<r>.json, whole or not at all; returns the path."""
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, f"rank{record['rank']}.json")
    part = f"{path}.{os.getpid()}.part"
    try:
        with open(part, "w") as out:
            json.dump(record, out, indent=1)
        os.replace(part, path)
    except BaseException:
        if os.path.exists(part):
            os.unlink(part)
        raise
    return path
