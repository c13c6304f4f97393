# SPDX-License-Identifier: Apache-2.0
"""The launching host of a job on several hosts: starts a launcher on each, lets them begin together, ends them together.

It runs no rank itself. What the hosts and it say to each other is described in ``line``.
"""

from __future__ import annotations

import argparse
import enum
import secrets
import selectors
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from . import processes
from .failures import Failure, describe, tell
from .launch import Job, LaunchError, arguments_of, pid_file
from .line import STRANGER_BYTES, Line, Lost, is_loopback, own_addresses
from .processes import RankSpec
from .say import Voice
from .transport import NoTransport, Transport, transports
from .watch import Patience, Phase, Watch

_START_S = 120.0  # until a host's launcher must have called back; Slurm lets a job wait for hours, there: after the first one
_GOODBYE_S = 1.0  # between the end of what carried a host's output and its last message on the line


class State(enum.Enum):
    STARTING = enum.auto()  # has not called back yet
    READY = enum.auto()
    RUNNING = enum.auto()
    ENDED = enum.auto()
    LOST = enum.auto()


@dataclass
class Host:
    name: str
    state: State = State.STARTING
    line: Line | None = None
    code: int | None = None
    failing: bool = False  # a rank of it has failed
    port: int = 0  # that it has reserved for a meeting
    failures: list[Failure] = field(default_factory=list)

    @property
    def over(self) -> bool:
        return self.state in (State.ENDED, State.LOST)

    @property
    def bad(self) -> bool:
        return self.failing or self.state is State.LOST or bool(self.code)


@dataclass
class Carrier:
    """A transport that has been started."""
    transport: Transport
    process: subprocess.Popen
    ended_at: float | None = None


class Listener:
    """Where hosts call back. ``contact`` is what they need to know for it."""

    def __init__(self, hosts: Sequence[str]) -> None:
        try:
            self.socket = socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
        except (OSError, ValueError):
            self.socket = socket.create_server(("0.0.0.0", 0), backlog=1024)
        self.socket.setblocking(False)
        self.token = secrets.token_hex(16)
        self.contact = f"{self.token}@{self.socket.getsockname()[1]}@{','.join(own_addresses(hosts))}"


class Head(Watch):
    """``min_hosts``: an elastic job goes on as long as so many are left; None: any failure ends the job."""

    kept = "hosts"

    def __init__(self, names: Sequence[str], carriers: Sequence[Transport], listener: Listener, say: Voice, *, master_addr: str,
                 master_port: int, min_hosts: int | None = None) -> None:
        super().__init__(say, Patience(settle_s=0.5))
        self.hosts = [Host(name) for name in names]
        self.listener = listener
        self.master_addr, self.master_port = master_addr, master_port
        self.min_hosts = len(names) if min_hosts is None else min_hosts
        self._transports = carriers
        self._carriers: list[Carrier] = []
        self._callers: list[Line] = []  # that have not said yet who they are
        self._begun = False  # the ranks may have started
        self._checked_at = 0.0
        self._start_clock = 0.0  # 0: it does not run yet

    def _start_all(self) -> None:
        self._selector.register(self.listener.socket, selectors.EVENT_READ, self.listener)
        for transport in self._transports:
            self.say("debug", f"{transport.name}: {' '.join(transport.argv)}")
            process = processes.start(RankSpec(-1, transport.argv, transport.env), stdin=subprocess.DEVNULL, stdout=None, stderr=None)
            self._carriers.append(Carrier(transport, process))
            self._guard.watch(process.pid)
        if not any(transport.may_queue for transport in self._transports):
            self._start_clock = time.monotonic()

    # --- one turn of the loop ----------------------------------------------------------------------------------------
    def _pause_s(self) -> float:
        return 0.2 if self.phase is Phase.RUNNING else 0.05

    def _look(self, events: list) -> None:
        now = time.monotonic()
        for key, _ in events:
            if key.data is self.listener:
                self._answer()
            elif isinstance(key.data, Line):
                self._hear(key.data, now)
        self._look_for_exits(now)
        if now - self._checked_at > 0.5:
            self._checked_at = now
            self._check_all(now)
        if self.phase is Phase.RUNNING and all(host.state is State.READY for host in self.hosts):
            self._go()

    def _answer(self) -> None:
        try:
            connection, address = self.listener.socket.accept()
        except OSError:
            return
        line = Line(connection, f"a caller from {address[0]}", STRANGER_BYTES)
        self._callers.append(line)
        self._selector.register(line, selectors.EVENT_READ, line)

    def _hear(self, line: Line, now: float) -> None:
        if line.fileno() < 0:  # closed in this very turn
            return
        host = next((host for host in self.hosts if host.line is line), None)
        if host is None:
            self._identify(line, now)
            return
        try:
            for message in line.receive(now):
                self._take(host, message, now)
        except Lost as problem:
            self._lose(host, str(problem), line.heard_at)

    def _identify(self, line: Line, now: float) -> None:
        try:
            hello = next((m for m in line.receive(now) if "hello" in m), None)
        except Lost:
            hello = {}
        if hello is None:
            return
        self._callers.remove(line)
        right = isinstance(hello.get("hello"), str) and secrets.compare_digest(hello["hello"], self.listener.token)
        host = self._host_of(hello) if right else None
        if host is None:
            if right:
                self.say("warning", f"a launcher called from a host that is not in the job: {hello.get('names')}")
            self._selector.unregister(line)
            line.close()
            return
        host.line, host.state, host.port = line, State.READY, int(hello["port"])
        line.trust(f"host {host.name}")
        self._start_clock = self._start_clock or now
        self.say("debug", f"host {host.name} is ready")
        if self.phase is not Phase.RUNNING:
            self._order(host, kill=1)

    def _host_of(self, hello: dict) -> Host | None:
        """By its number, where it was told one; else by its names, and if those say nothing by its place among the callers."""
        free = [host for host in self.hosts if host.state is State.STARTING]
        if hello["node_rank"] >= 0:
            host = self.hosts[hello["node_rank"]]
            return host if host in free else None
        names = set(hello["names"])
        for host in free:
            if host.name in names or host.name.split(".")[0] in names:
                return host
        place = hello["place"]
        return self.hosts[place] if 0 <= place < len(self.hosts) and self.hosts[place] in free else None

    def _take(self, host: Host, message: dict, now: float) -> None:
        if "failed" in message:
            host.failing = True
        elif "done" in message and not host.over:
            host.code, host.state = message["done"], State.ENDED
            host.failures = [Failure.from_message(failure, host.name, now) for failure in message["failures"]]
            self._hang_up(host)
            if host.bad:
                self._tell_the_others(host)

    def _look_for_exits(self, now: float) -> None:
        for carrier in self._carriers:
            code = processes.exit_status(carrier.process.pid)
            if code is None:
                continue
            carrier.ended_at = carrier.ended_at or now
            for host in (self.hosts[rank] for rank in carrier.transport.node_ranks):
                if not host.over and (now - carrier.ended_at > _GOODBYE_S or host.line is None):
                    what = f"{carrier.transport.name} ended with {describe(code)}"
                    if host.line is None:
                        why = f"its launcher did not start: {what}, see its message above; try: ssh {host.name} true"
                    else:
                        why = f"{what} while the job was running"
                    self._lose(host, why, carrier.ended_at)

    def _check_all(self, now: float) -> None:
        for host in self.hosts:
            if host.line is not None and not host.over:
                self._hear(host.line, now)  # notices silence
            if host.line is not None and not host.over:
                try:
                    host.line.beat(now)
                except Lost as problem:
                    self._lose(host, str(problem), host.line.heard_at)
            elif host.state is State.STARTING and self._start_clock and now - self._start_clock > _START_S:
                self._lose(host, f"its launcher has not called back for {_START_S:g} s", now)
        for line in list(self._callers):
            if now - line.heard_at > 10:
                self._callers.remove(line)
                self._selector.unregister(line)
                line.close()

    # --- the hosts ---------------------------------------------------------------------------------------------------
    def _go(self) -> None:
        self._begun = True
        first = self.hosts[0]
        if first.port != self.master_port and self.master_port:
            self.say("warning", f"port {self.master_port} is in use on {first.name}; the processes meet on port {first.port} instead")
        own = first.line.other_address
        address = self.master_addr or (first.name if is_loopback(own) and len(self.hosts) > 1 else own)
        self.say("debug", f"{len(self.hosts)} hosts are ready; their ranks meet at {address}:{first.port}")
        for node_rank, host in enumerate(self.hosts):
            host.state = State.RUNNING
            self._order(host, go=1, node_rank=node_rank, master_addr=address, master_port=first.port)

    def _order(self, host: Host, **message) -> None:
        try:
            host.line.send(**message)
        except Lost as problem:
            self._lose(host, str(problem), host.line.heard_at)

    def _lose(self, host: Host, why: str, at: float) -> None:
        if host.over:
            return
        host.state = State.LOST
        # What the end of the job has cut off is no failure of its own.
        by_us = self.phase in (Phase.STOPPING, Phase.KILLED)
        host.failures.append(Failure(host.name, None, 1, at, by_us=by_us, why=why))
        self._hang_up(host)
        for carrier in self._carriers:
            if carrier.transport.node_ranks == [self.hosts.index(host)]:
                processes.send({carrier.process.pid}, signal.SIGKILL)
        self._tell_the_others(host)

    def _hang_up(self, host: Host) -> None:
        if host.line is not None and host.line.fileno() >= 0:
            self._selector.unregister(host.line)
            host.line.close()

    def _tell_the_others(self, lost: Host) -> None:
        """An elastic job goes on without it. See Note [A host is lost] in ``elastic``."""
        if self.phase is not Phase.RUNNING or self._trouble():
            return
        why = lost.failures[0].why if lost.failures else f"exit code {lost.code}"
        self.say("warning", f"host {lost.name} is lost: {why}; going on with those that are left")
        for host in self.hosts:
            if host.state is State.RUNNING:
                self._order(host, host_lost=lost.name)

    # --- for the loop ------------------------------------------------------------------------------------------------
    def _trouble(self) -> bool:
        # The first host of an elastic job holds what the others meet through.
        return self.hosts[0].bad or sum(not host.bad for host in self.hosts) < self.min_hosts

    def _all_well(self) -> bool:
        return all(host.over for host in self.hosts) and not self._trouble()

    def _settled(self) -> bool:
        return False  # a host with an older failure may be about to say so

    def _count(self) -> int:
        return len(self.hosts)

    def _send(self, number: int) -> None:
        for host in self.hosts:
            if host.over or host.line is None:
                continue
            if number == signal.SIGKILL:
                self._order(host, kill=1)
            elif self.phase is Phase.RUNNING or number == self.signal_received:
                self._order(host, signal=int(number))
            else:
                self._order(host, stop=1)
        if self.phase is Phase.RUNNING:
            return
        for carrier in self._carriers:
            hosts = [self.hosts[rank] for rank in carrier.transport.node_ranks]
            if all(host.line is None for host in hosts) or number == signal.SIGKILL and all(host.over for host in hosts):
                processes.send({carrier.process.pid}, number)

    def _left(self) -> list[str]:
        hosts = [host.name for host in self.hosts if not host.over and host.line is not None]
        return hosts + [f"{c.transport.name} (process {c.process.pid})" for c in self._carriers
                        if processes.exit_status(c.process.pid) is None or processes.members({c.process.pid})]

    def _reap_all(self) -> None:
        groups = {carrier.process.pid for carrier in self._carriers}
        processes.send(groups, signal.SIGKILL)
        for carrier in self._carriers:
            self._guard.forget(carrier.process.pid)
            try:
                carrier.process.wait(timeout=1)
            except subprocess.TimeoutExpired:
                pass  # said above
        for host in self.hosts:
            if host.line is not None:
                host.line.close()
        self.listener.socket.close()

    def _report(self) -> int:
        failures = [failure for host in self.hosts for failure in host.failures]
        if self.signal_received is None and not self._trouble():
            return 0  # an elastic job that has lost hosts and ended well
        if self.signal_received is not None and not self._begun:
            self.say("info", f"stopped by {signal.Signals(self.signal_received).name} before the hosts were ready")
            return 128 + self.signal_received
        return tell(failures, self.signal_received, self.say)


def run_on_hosts(job: Job, args: argparse.Namespace, say: Voice) -> int:
    """Run a job on its hosts, started as ``args`` of the command line say; returns its exit code."""
    names = list(job.world_info)
    listener = Listener(names)
    try:
        carriers = transports(args.launcher.lower(), names, arguments_of(job, listener.contact, args.log_level), args.launcher_args,
                              args.ssh_port, say)
        head = Head(names, carriers, listener, say, master_addr=job.master_addr, master_port=job.master_port,
                    min_hosts=job.elastic.min_hosts if job.elastic else None)
        with pid_file(job.save_pid):
            return head.run()
    except NoTransport as problem:
        raise LaunchError(str(problem)) from None
    finally:
        listener.socket.close()
