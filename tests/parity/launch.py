# SPDX-License-Identifier: Apache-2.0
"""Runs a test's body on N ranks, in processes that are reused from test to test.

    from tests.parity.launch import on_ranks, run

    @on_ranks(2)                                  # the body runs on both ranks; parameters and fixtures are pickled
    @pytest.mark.parametrize("stage", [0, 3])
    def test_losses(stage): ...

    results = run(function, 2, arg, timeout=60)   # the same by hand; a list with every rank's return value

Inside, `torch.distributed` is initialised (gloo unless `backend=` says otherwise), RANK, LOCAL_RANK, WORLD_SIZE,
LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT are set, torch has one thread, and every random generator is seeded with 0.

When a rank raises, the test fails with that rank's traceback (the first one in time; later ones are usually its
consequence), when a rank dies, with the signal and the end of its output, when time is up, with the stacks of all ranks.
Then the processes are killed and the next test gets fresh ones. That is cheap, since ranks are forked from a server that
has imported torch.

Note [Functions by reference]: the function travels as (module name, file, qualified name), so it must be reachable from
its module: no lambdas, no functions inside functions. Extra values go in as arguments.
"""
import atexit
import faulthandler
import functools
import importlib.util
import inspect
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from multiprocessing import connection, get_context
from pathlib import Path
from typing import NamedTuple

import pytest

DEFAULT_TIMEOUT_S = 60.0
START_TIMEOUT_S = 120.0  # the first start imports torch, maybe beside a compiler on the same cores
GRACE_S = 3.0  # how long the other ranks may take to report after the first has raised
LOG_TAIL_BYTES = 6000


class RankFailure(AssertionError):
    """Some rank raised, died or did not finish. `rank` is the first one; `reports` holds what each rank said (None: nothing)."""

    def __init__(self, message, rank, reports):
        super().__init__(message)
        self.rank = rank
        self.reports = reports


class _Task(NamedTuple):
    module: str
    file: str
    qualname: str
    args: tuple
    kwargs: dict


class _Report(NamedTuple):
    outcome: str  # "ok" | "raised" | "skipped"
    value: object  # the result, the traceback or the reason for the skip
    reusable: bool  # False once the function has taken the process group down
    at_s: float  # CLOCK_MONOTONIC, one clock for all ranks of a host: tells who raised first


# ---------------------------------------------------------------------------------------------------- inside a rank


def _load(module, file):
    if module in sys.modules:
        return sys.modules[module]
    spec = importlib.util.spec_from_file_location(module, file)
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[module] = loaded
    try:
        spec.loader.exec_module(loaded)
    except BaseException:
        del sys.modules[module]
        raise
    return loaded


def _resolve(task):
    value = _load(task.module, task.file)
    for part in task.qualname.split("."):
        value = getattr(value, part)
    return getattr(value, "_body_on_ranks", value)


def _fresh_state():
    """What one test could leave behind for the next."""
    import gc
    import random

    import numpy
    import torch

    checkpointing = sys.modules.get("deepspeed.checkpointing.configuration")
    if checkpointing is not None:
        checkpointing.state().accept(checkpointing.Options(), configured=False)
    gc.collect()
    torch.set_default_dtype(torch.float32)
    torch.set_grad_enabled(True)
    torch.manual_seed(0)
    random.seed(0)
    numpy.random.seed(0)


def _execute(payload):
    import torch.distributed as dist

    try:
        # Module first: the arguments may be of classes defined there.
        head, body = pickle.loads(payload)
        _load(*head[:2])
        task = _Task(*head, *pickle.loads(body))
        _fresh_state()
        value = _resolve(task)(*task.args, **task.kwargs)
        return pickle.dumps(_Report("ok", value, dist.is_initialized(), time.monotonic()))
    except pytest.skip.Exception as skipped:
        return pickle.dumps(_Report("skipped", str(skipped), dist.is_initialized(), time.monotonic()))
    except BaseException:
        return pickle.dumps(_Report("raised", traceback.format_exc(), False, time.monotonic()))


def _die_with_parent():
    import ctypes

    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def _join_group(pipe, rank, world_size, backend):
    """Rank 0 opens the store on a port the kernel picks and tells the others: no port is guessed, none is raced for."""
    from datetime import timedelta

    import torch.distributed as dist

    wait = timedelta(seconds=START_TIMEOUT_S)
    if rank == 0:
        store = dist.TCPStore("127.0.0.1", 0, world_size, True, timeout=wait, wait_for_workers=False)
        pipe.send(store.port)
        port = pipe.recv()
    else:
        port = pipe.recv()
        store = dist.TCPStore("127.0.0.1", port, world_size, False, timeout=wait)
    os.environ.update(MASTER_PORT=str(port))
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timedelta(minutes=5))


def _rank_main(pipe, rank, world_size, backend, log):
    _die_with_parent()
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    faulthandler.enable(file=sys.stderr)
    faulthandler.register(signal.SIGUSR1, file=sys.stderr, all_threads=True)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1", OMP_NUM_THREADS="1",
    )
    import torch

    torch.set_num_threads(1)
    _join_group(pipe, rank, world_size, backend)
    pipe.send("ready")
    while True:
        try:
            payload = pipe.recv_bytes()
        except EOFError:
            break
        pipe.send_bytes(_execute(payload))
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(0)  # the others may be gone already: no collective teardown


# ------------------------------------------------------------------------------------------------------ in the test


class Pool:
    """world_size processes that share one process group. Usable until `close`, which a failure calls."""

    def __init__(self, world_size, backend="gloo"):
        self.world_size = world_size
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")
        self.logs = [Path(self._folder.name) / f"rank{r}.log" for r in range(world_size)]
        self._marks = [0] * world_size
        self.pipes, self.processes = [], []
        context = _context()
        try:
            for rank in range(world_size):
                ours, theirs = context.Pipe()
                process = context.Process(target=_rank_main, args=(theirs, rank, world_size, backend, str(self.logs[rank])),
                                          name=f"rank{rank}")
                process.start()
                theirs.close()
                self.pipes.append(ours)
                self.processes.append(process)
            deadline = time.monotonic() + START_TIMEOUT_S
            port = self._receive(0, deadline)
            for pipe in self.pipes:
                pipe.send(port)
            for rank in range(world_size):
                self._receive(rank, deadline)
        except BaseException:
            self.close()
            raise

    def _receive(self, rank, deadline):
        try:
            if self.pipes[rank].poll(max(0.0, deadline - time.monotonic())):
                return self.pipes[rank].recv()
            problem = f"rank {rank} did not start in {START_TIMEOUT_S:g} s"
        except (EOFError, OSError):
            problem = f"rank {rank} died while it started"
        raise RankFailure(problem + self.output(), rank, [None] * self.world_size)

    def output(self):
        """What the ranks have printed since the last call to `run`."""
        parts = []
        for rank, log in enumerate(self.logs):
            data = log.read_bytes()[self._marks[rank]:] if log.exists() else b""
            if data:
                cut = "[...]" if len(data) > LOG_TAIL_BYTES else ""
                parts.append(f"\n--- output of rank {rank} ---\n{cut}{data[-LOG_TAIL_BYTES:].decode(errors='replace')}")
        return "".join(parts)

    def run(self, payload, timeout):
        """Every rank's report, as soon as all have one; otherwise those that came before death, timeout or grace ended it."""
        __tracebackhide__ = True
        for rank, log in enumerate(self.logs):
            self._marks[rank] = log.stat().st_size if log.exists() else 0
        for pipe in self.pipes:
            pipe.send_bytes(payload)
        reports = [None] * self.world_size
        bad = {}  # rank -> (when, what it did)
        waiting = {pipe: rank for rank, pipe in enumerate(self.pipes)}
        deadline = time.monotonic() + timeout
        while waiting:
            ready = connection.wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for pipe in ready:
                rank = waiting.pop(pipe)
                try:
                    reports[rank] = pickle.loads(pipe.recv_bytes())
                    if reports[rank].outcome == "raised":
                        bad[rank] = (reports[rank].at_s, f"raised\n{reports[rank].value}")
                except (EOFError, OSError):
                    bad[rank] = (time.monotonic(), self._how_it_died(rank))
            if bad:
                deadline = min(deadline, min(when for when, _ in bad.values()) + GRACE_S)
        if bad:
            self._fail(bad, sorted(waiting.values()), reports)
        if waiting:
            self._fail_timeout(timeout, sorted(waiting.values()), reports)
        return reports

    def _how_it_died(self, rank):
        self.processes[rank].join(GRACE_S)
        code = self.processes[rank].exitcode
        if code is not None and code < 0:
            return f"was killed by {signal.Signals(-code).name}"
        return f"exited with code {code}"

    def _fail(self, bad, silent, reports):
        __tracebackhide__ = True
        # A signal is never the consequence of another rank's exception, but is noticed late: when the process is gone.
        first = min(bad, key=lambda rank: (not bad[rank][1].startswith("was killed by"), bad[rank][0]))
        text = f"rank {first} of {self.world_size} {bad[first][1]}"
        for rank in sorted(set(bad) - {first}):
            last_line = bad[rank][1].strip().splitlines()[-1]
            text += f"\nafter it, rank {rank}: {last_line}"
        if silent:
            text += f"\nranks {silent} had not finished {GRACE_S:g} s later"
        raise RankFailure(text + self.output(), first, reports)

    def _fail_timeout(self, timeout, ranks, reports):
        __tracebackhide__ = True
        for rank in ranks:
            os.kill(self.processes[rank].pid, signal.SIGUSR1)  # faulthandler writes the stacks into the log
        time.sleep(0.5)
        raise RankFailure(f"ranks {ranks} of {self.world_size} not done after {timeout:g} s{self.output()}", ranks[0], reports)

    def close(self):
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        self._folder.cleanup()


_pools = {}


@functools.cache
def _context():
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before the server loads OpenMP: forked ranks inherit its choice
    context = get_context("forkserver")
    # torch._dynamo, which the first step of any optimizer imports: a second of each rank.
    context.set_forkserver_preload(["torch", "torch.distributed", "torch._dynamo", "numpy", "pytest"])
    atexit.register(shutdown)
    return context


def shutdown():
    """Ends all ranks. The next `run` starts new ones."""
    while _pools:
        _pools.popitem()[1].close()


def _payload(function, args, kwargs):
    if "<" in function.__qualname__:
        raise ValueError(f"{function.__qualname__}: a function that runs on ranks must be at module level (see the Note)")
    head = (function.__module__, inspect.getsourcefile(function), function.__qualname__)
    return pickle.dumps((head, pickle.dumps((args, kwargs))))


def run(function, world_size, *args, timeout=DEFAULT_TIMEOUT_S, backend="gloo", fresh=False, **kwargs):
    """Calls function(*args, **kwargs) on world_size ranks and returns the list of their results, in rank order.

    Arguments and results are pickled. Raises RankFailure as the module says; skips when a rank calls pytest.skip.
    `fresh`: on processes that run nothing else, before or after.
    """
    __tracebackhide__ = True
    payload = _payload(function, args, kwargs)
    key = (world_size, backend)
    if fresh and key in _pools:
        _pools.pop(key).close()
    pool = _pools.get(key)
    if pool is None:
        pool = _pools[key] = Pool(world_size, backend)
    try:
        reports = pool.run(payload, timeout)
    except BaseException:
        _pools.pop(key).close()
        raise
    if fresh or not all(report.reusable for report in reports):
        _pools.pop(key).close()
    for report in reports:
        if report.outcome == "skipped":
            pytest.skip(report.value)
    return [report.value for report in reports]


def on_ranks(world_size, *, timeout=DEFAULT_TIMEOUT_S, backend="gloo", fresh=False):
    """Decorator: the test's body runs on world_size ranks. See the module's text."""

    def decorate(body):
        @functools.wraps(body)
        def test(*args, **kwargs):
            __tracebackhide__ = True
            run(body, world_size, *args, timeout=timeout, backend=backend, fresh=fresh, **kwargs)

        test._body_on_ranks = body
        return test

    return decorate
