# SPDX-License-Identifier: Apache-2.0
"""The elastic agent of a host: torch's, on torch's own rendezvous, with three changes. Imports torch, so it is a process of its own.

A rank that a signal has killed is not started again: the script restarts with the ranks that are left. One that ended
with an exception is (its device is fine, its input may have been bad). And what ranks have started ends with them.

Note [A host is lost]
    Ranks that wait for those of a lost host would notice only when their collective times out, and torch's agent looks at
    its own ranks alone. The launching host notices within seconds; its word comes here as SIGUSR2 and counts as a failure
    of all ranks: they are stopped and the hosts that are left meet anew. The store of the rendezvous is on the first
    host; if that one is lost, the job ends.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import socket
import sys

from torch.distributed.elastic.agent.server.api import RunResult, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.agent.server import WorkerSpec
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from . import processes
from .failures import describe, shell_code
from .guard import Guard
from .line import is_loopback, own_addresses
from .say import Voice

# Seconds. A host whose agent is silent for three intervals is out; after the first hosts have met, others may join for a while.
_RENDEZVOUS = {"keep_alive_interval": 2, "keep_alive_max_attempt": 3, "last_call_timeout": 5, "join_timeout": 600}
# The rank itself is the problem. Not an abort: that is how libraries end the other ranks when one is gone.
_LOST = (-signal.SIGKILL, -signal.SIGSEGV, -signal.SIGBUS)
_LOOK_S = 0.1
_EXIT_S = 30.0  # the last host may be so much later than the first


class Agent(LocalElasticAgent):
    """``guard`` ends the ranks if this process is killed."""

    def __init__(self, spec: WorkerSpec, logs: DefaultLogsSpecs, guard: Guard, say: Voice) -> None:
        super().__init__(spec, logs, exit_barrier_timeout=_EXIT_S)
        self._guard, self._say = guard, say
        self._groups: set[int] = set()
        self._host_lost = False
        signal.signal(signal.SIGUSR2, self._on_host_lost)

    def _on_host_lost(self, *_) -> None:
        self._host_lost = True

    def _start_workers(self, worker_group):
        pids = super()._start_workers(worker_group)
        self._groups = set(pids.values())
        for pid in self._groups:
            self._guard.watch(pid)
        first = min(worker.global_rank for worker in worker_group.workers)
        self._say("info", f"elastic: {socket.gethostname()} runs {len(pids)} of {worker_group.workers[0].world_size} ranks, from rank "
                  f"{first}; restarts left: {self._remaining_restarts}")
        return pids

    def _shutdown(self, death_sig=signal.SIGTERM) -> None:
        super()._shutdown(death_sig)
        processes.send(self._groups, signal.SIGKILL)  # what the ranks have started
        for pid in self._groups:
            self._guard.forget(pid)
        self._groups = set()

    def _monitor_workers(self, worker_group) -> RunResult:
        if self._host_lost:
            self._host_lost = False
            return RunResult(state=WorkerState.UNHEALTHY)
        # Before torch looks: when it finds a failure it ends the others, and those have codes then, too.
        codes = {rank: handler.proc.poll() for rank, handler in self._pcontext.subprocess_handlers.items()}
        result = super()._monitor_workers(worker_group)
        if result.is_failed():
            codes = {rank: code for rank, code in codes.items() if code} or {f.local_rank: f.exitcode for f in result.failures.values()}
            for local_rank, code in codes.items():
                rank = worker_group.workers[local_rank].global_rank
                self._say("error", f"elastic: rank {rank} on {socket.gethostname()} failed: {describe(code)}")
            self._leave_out([rank for rank, code in codes.items() if code in _LOST])
        return result

    def _leave_out(self, local_ranks: list[int]) -> None:
        spec = self._worker_group.spec
        if not local_ranks or self._remaining_restarts == 0:
            return
        if len(local_ranks) >= spec.local_world_size:
            self._remaining_restarts = 0  # nobody is left on this host
            return
        devices = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        if len(devices) == spec.local_world_size:
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(d for i, d in enumerate(devices) if i not in local_ranks)
        spec.local_world_size -= len(local_ranks)


def _parse(args: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="deepspeed.launcher.elastic", description="Keep the ranks of a host of an elastic job.")
    add = parser.add_argument
    add("--ranks", type=int, required=True)
    add("--hosts", required=True, metavar="MIN:MAX")
    add("--max_restarts", type=int, required=True)
    add("--meet", required=True, metavar="ADDR:PORT", help="where the rendezvous is")
    add("--node_rank", type=int, required=True)
    add("--log_dir", default=None)
    add("command", nargs="+")
    return parser.parse_args(args)


def _spec(args: argparse.Namespace) -> WorkerSpec:
    least, most = map(int, args.hosts.split(":"))
    master = args.meet.rpartition(":")[0]
    own = master if args.node_rank == 0 or is_loopback(master) else own_addresses([master])[0]
    handler = get_rendezvous_handler(RendezvousParameters(
        backend="c10d", endpoint=args.meet, run_id="deepspeed", min_nodes=least, max_nodes=most, local_addr=own,
        is_host=args.node_rank == 0, **_RENDEZVOUS))
    return WorkerSpec(role="deepspeed", local_world_size=args.ranks, rdzv_handler=handler, max_restarts=args.max_restarts,
                      monitor_interval=_LOOK_S, entrypoint=args.command[0], args=tuple(args.command[1:]), local_addr=own)


def main(args: list[str] | None = None) -> None:
    guard = Guard()  # before torch's threads exist
    parsed = _parse(args)
    say = Voice()
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # what it reports is said here, with hosts
    # With a store shared by all rounds, ranks find each other by the number of restarts, on which agents need not agree.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGTERM,SIGINT,SIGHUP"
    logs = DefaultLogsSpecs(log_dir=parsed.log_dir, redirects=Std.ALL if parsed.log_dir else Std.NONE)
    try:
        spec = _spec(parsed)
        try:
            result = Agent(spec, logs, guard, say).run()
        finally:
            spec.rdzv_handler.shutdown()
    except SignalException as death:
        code = 128 + death.sigval
    else:
        failures = sorted(result.failures.values(), key=lambda failure: failure.timestamp)
        code = shell_code(failures[0].exitcode) if failures else 1 if result.is_failed() else 0
        if code:
            say("error", "elastic: giving up, no restart is left" if parsed.max_restarts else "elastic: giving up")
    guard.close()
    sys.exit(code)


if __name__ == "__main__":
    main()
