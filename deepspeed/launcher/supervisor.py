# SPDX-License-Identifier: Apache-2.0
"""Keeps the ranks of this host: starts them, waits, and when one fails or a signal arrives, ends them all.

The exit code of the job is that of the rank that failed first (128 + N if signal N killed it), or 0. When the job has
other hosts too (``line``), failures are handed to the launching host, which tells them, and its orders are followed.
"""

from __future__ import annotations

import os
import selectors
import signal
import socket
import subprocess
import time
from dataclasses import dataclass

from . import processes
from .failures import Failure, job_code, tell
from .line import Line, Lost
from .processes import RankSpec
from .relay import Relay
from .say import Voice, terminal
from .watch import PASSED_SIGNALS, Patience, Phase, Watch


@dataclass
class Rank:
    spec: RankSpec
    process: subprocess.Popen
    relay: Relay | None
    code: int | None = None  # None while it runs; negative: killed by that signal
    ended_at: float = 0.0
    by_us: bool = False  # it ended after we had told it to

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def failed(self) -> bool:
        return self.code not in (None, 0)

    def failed_at(self) -> float:
        """When the trouble began: at the traceback, which may precede the exit by a slow teardown."""
        if self.relay is not None and self.relay.failed_at is not None:
            return min(self.ended_at, self.relay.failed_at)
        return self.ended_at

    def failure(self, host: str) -> Failure:
        """Takes what the relay holds."""
        text = b"" if self.relay is None else self.relay.take_held()
        return Failure(host, self.spec.rank, self.code, self.failed_at(), self.pid, self.by_us,
                       text.decode(errors="replace"), self.relay is not None and self.relay.failed_at is not None,
                       self.spec.log_path, label=self.spec.label)


class Supervisor(Watch):
    """``line``: to the launching host; None when this is it."""

    def __init__(self, specs: list[RankSpec], say: Voice, patience: Patience = Patience(), line: Line | None = None) -> None:
        super().__init__(say, patience)
        self.specs = specs
        self.line = line
        self.ranks: list[Rank] = []
        self._failure_sent = False

    # --- starting ----------------------------------------------------------------------------------------------------
    def _start_all(self) -> None:
        if self.line is not None:
            self._selector.register(self.line, selectors.EVENT_READ, self.line)
        for local_rank, spec in enumerate(self.specs):
            try:
                rank = self._start(spec, first=local_rank == 0)
            except OSError as error:
                what = f"write its log {error.filename}" if error.filename == spec.log_path else f"start {spec.argv[0]}"
                raise StartError(f"rank {spec.rank}: cannot {what}: {error.strerror}", error) from None
            self.ranks.append(rank)
            self._guard.watch(rank.pid)
            self.say("debug", f"rank {spec.rank} is process {rank.pid}: {' '.join(spec.argv)}")

    def _start(self, spec: RankSpec, first: bool) -> Rank:
        log_fd = None
        if spec.log_path is not None:
            log_fd = os.open(spec.log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        # A single rank has nobody to confuse it with: it gets the terminal itself.
        relayed = len(self.specs) > 1 or log_fd is not None or self.line is not None
        read_end, write_end = os.pipe() if relayed else (-1, None)
        try:
            process = processes.start(spec, stdin=None if first else subprocess.DEVNULL, stdout=log_fd,
                                      stderr=write_end)
        except BaseException:
            if relayed:
                os.close(read_end)
            raise
        finally:
            if relayed:
                os.close(write_end)
        relay = None
        if relayed:
            os.set_blocking(read_end, False)
            relay = Relay(read_end, log_fd)
            self._selector.register(read_end, selectors.EVENT_READ, relay)
        return Rank(spec, process, relay)

    # --- one turn of the loop ----------------------------------------------------------------------------------------
    def _pause_s(self) -> float:
        if any(rank.relay and rank.relay.resting for rank in self.ranks):
            return 0.02
        if self.phase is not Phase.RUNNING or any(r.relay and r.relay.holding for r in self.ranks):
            return 0.05
        return 1.0

    def _look(self, events: list) -> None:
        # Exits before output: a rank that was killed must be seen before the traceback of the one that missed it.
        self._look_for_exits()
        now = time.monotonic()
        for key, _ in events:
            if isinstance(key.data, Relay):
                self._read(key.data, now)
        for rank in self.ranks:
            if rank.relay is not None:
                if not events:
                    rank.relay.settle()
                self._rest_or_wake(rank.relay)
        self._release_logged_tracebacks(now)
        if self.line is not None:
            self._follow(self.line, now)

    def _look_for_exits(self) -> None:
        for rank in self.ranks:
            if rank.code is None:
                rank.code = processes.exit_status(rank.pid)
                if rank.code is not None:
                    rank.ended_at = time.monotonic()
                    rank.by_us = self.phase in (Phase.STOPPING, Phase.KILLED)
                    if rank.relay is not None:
                        # What is left in its pipe; a child of its own may still hold the other end.
                        self._read(rank.relay, rank.ended_at, all_of_it=True)
                        if rank.code == 0 or not rank.relay.holding:
                            rank.relay.release()
        if os.getpid() == 1:
            processes.reap_strangers({rank.pid for rank in self.ranks})

    def _read(self, relay: Relay, now: float, all_of_it: bool = False) -> None:
        was_read = not relay.at_end and not relay.resting
        relay.read_rest(now) if all_of_it else relay.read(now)
        if was_read and relay.at_end:
            self._selector.unregister(relay.fd)

    def _rest_or_wake(self, relay: Relay) -> None:
        """See Note [Nobody reads]."""
        relay.hurried = self.phase in (Phase.STOPPING, Phase.KILLED)
        if relay.at_end:
            relay.resting = False
        elif relay.resting and (relay.hurried or relay.backlog < 0.5):
            relay.resting = False
            self._selector.register(relay.fd, selectors.EVENT_READ, relay)
        elif not relay.resting and not relay.hurried and relay.backlog >= 1:
            relay.resting = True
            self._selector.unregister(relay.fd)

    def _release_logged_tracebacks(self, now: float) -> None:
        """See Note [One traceback]."""
        if self.phase is not Phase.RUNNING:
            return
        # A traceback that has been released counts as well: its rank may be slow to end and the cause all the same.
        begun = [(r.relay.failed_at, r.spec.rank) for r in self.ranks if r.relay and r.relay.failed_at is not None]
        oldest = min((entry for entry in begun if now - entry[0] <= self.patience.doubtful_s), default=None)
        for rank in self.ranks:
            if rank.code is None and rank.relay and rank.relay.holding:
                is_oldest = (rank.relay.failed_at, rank.spec.rank) == oldest
                patience = self.patience.logged_s if is_oldest else self.patience.doubtful_s
                if now - rank.relay.held_since > patience:
                    rank.relay.release()

    def _follow(self, line: Line, now: float) -> None:
        """Orders of the launching host. Without it nobody would ever end this host's ranks: they go at once."""
        if line.lost:
            return
        try:
            for message in line.receive(now):
                if "signal" in message:
                    self._obey(message["signal"])
                elif "host_lost" in message:
                    self._send(signal.SIGUSR2)  # only said to elastic agents, see Note [A host is lost]
                elif "kill" in message:
                    self._stop(signal.SIGKILL)
                elif "stop" in message and self.phase in (Phase.RUNNING, Phase.FAILED):
                    self._stop(signal.SIGTERM)
            if self._trouble() and not self._failure_sent:
                self._failure_sent = True
                line.send(failed=min(r.spec.rank for r in self.ranks if r.failed))
            line.beat(now)
        except Lost as problem:
            self._selector.unregister(line)
            self.say("error", f"{problem}: ending this host's processes")
            self._stop(signal.SIGKILL)

    def _obey(self, number: int) -> None:
        """A signal that the launching host got, and has said so."""
        if number in PASSED_SIGNALS:
            self._send(number)
        elif self.phase in (Phase.RUNNING, Phase.FAILED):
            self.signal_received = number
            self._stop(number)

    def _trouble(self) -> bool:
        return any(rank.failed for rank in self.ranks)

    def _all_well(self) -> bool:
        return all(rank.code == 0 for rank in self.ranks)

    def _settled(self) -> bool:
        begun = min(rank.failed_at() for rank in self.ranks if rank.failed)
        return not any(r.code is None and r.relay and r.relay.holding and r.relay.held_since < begun for r in self.ranks)

    def _count(self) -> int:
        return len(self.ranks)

    def _send(self, number: int) -> None:
        processes.send(self._pids(), number)

    # --- the end -----------------------------------------------------------------------------------------------------
    def _left(self) -> list[int]:
        left = processes.members(self._pids())
        return left or [rank.pid for rank in self.ranks if rank.code is None]

    def _pids(self) -> set[int]:
        return {rank.pid for rank in self.ranks}

    def _reap_all(self) -> None:
        if any(rank.code is None for rank in self.ranks):  # an error brought us here
            processes.send(self._pids(), signal.SIGKILL)
        for rank in self.ranks:
            if rank.relay is not None:
                rank.relay.close()
                if rank.relay.log_fd is not None:
                    os.close(rank.relay.log_fd)
            self._guard.forget(rank.pid)
            try:
                rank.process.wait(timeout=1)
            except subprocess.TimeoutExpired:
                pass  # said above

    def _report(self) -> int:
        for rank in self.ranks:
            if rank.relay and not rank.failed:
                rank.relay.release()
        if self._trouble() and any(rank.relay and rank.relay.mid_line for rank in self.ranks):
            terminal.write(b"\n")
        left_out = sum(rank.relay.left_out for rank in self.ranks if rank.relay)
        if left_out:
            self.say("warning", f"{left_out} bytes of the ranks' last output are left out: nobody has read them in time")
        failures = [rank.failure(socket.gethostname()) for rank in self.ranks if rank.failed]
        if self.line is None:
            return tell(failures, self.signal_received, self.say)
        code = job_code(failures, self.signal_received)
        if self.line.lost:
            return tell(failures, self.signal_received, self.say)
        try:
            now = time.monotonic()
            self.line.send(done=code, failures=[failure.message(now) for failure in failures])
        except Lost:
            tell(failures, self.signal_received, self.say)
        return code


class StartError(Exception):
    """A rank's program cannot be started. ``code`` is what a shell would exit with."""

    def __init__(self, message: str, error: OSError) -> None:
        super().__init__(message)
        self.code = 127 if isinstance(error, FileNotFoundError) else 126
