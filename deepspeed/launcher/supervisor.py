# SPDX-License-Identifier: Apache-2.0
"""Keeps the ranks of this host: starts them, waits, and when one fails or a signal arrives, ends them all.

The exit code of the job is that of the rank that failed first (128 + N if signal N killed it), or 0.
"""

from __future__ import annotations

import enum
import os
import selectors
import signal
import subprocess
import time
from dataclasses import dataclass, field

from . import processes
from .guard import Guard
from .processes import RankSpec
from .relay import Relay, last_line, write_stderr
from .say import Voice

STOPPING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
PASSED_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2)


@dataclass(frozen=True)
class Patience:
    """How long to wait for what, in seconds."""
    settle_s: float = 1.0  # for a rank whose traceback is older than that of the rank that exited first
    after_failure_s: float = 3.0  # from SIGTERM to SIGKILL when a rank has failed
    after_signal_s: float = 30.0  # from a forwarded signal to SIGKILL: time to save a checkpoint
    after_kill_s: float = 5.0  # until a process that SIGKILL does not end is given up
    logged_s: float = 2.0  # until a traceback of a rank that lives on is shown
    doubtful_s: float = 10.0  # the same while an older traceback may be its cause


class Phase(enum.Enum):
    RUNNING = enum.auto()
    FAILED = enum.auto()  # a rank has failed; the others may still say something
    STOPPING = enum.auto()  # told to end
    KILLED = enum.auto()


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


@dataclass
class Supervisor:
    """Run with :meth:`run`, once, from the main thread."""

    specs: list[RankSpec]
    say: Voice
    patience: Patience = Patience()
    ranks: list[Rank] = field(default_factory=list)
    phase: Phase = Phase.RUNNING
    deadline: float = 0.0
    signal_received: int | None = None

    def run(self) -> int:
        guard = Guard()
        self._wakeup = _SignalPipe()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._wakeup.read_end, selectors.EVENT_READ)
        try:
            self._start_all(guard)
            while not self._finished():
                self._turn()
            return self._report()
        finally:
            self._reap_all(guard)
            self._selector.close()
            self._wakeup.close()
            guard.close()

    # --- starting ----------------------------------------------------------------------------------------------------
    def _start_all(self, guard: Guard) -> None:
        for local_rank, spec in enumerate(self.specs):
            try:
                rank = self._start(spec, first=local_rank == 0)
            except OSError as error:
                raise StartError(f"rank {spec.rank}: cannot start {spec.argv[0]}: {error.strerror}", error) from None
            self.ranks.append(rank)
            guard.watch(rank.pid)
            self.say("debug", f"rank {spec.rank} is process {rank.pid}: {' '.join(spec.argv)}")

    def _start(self, spec: RankSpec, first: bool) -> Rank:
        log_fd = None
        if spec.log_path is not None:
            log_fd = os.open(spec.log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        # A single rank has nobody to confuse it with: it gets the terminal itself.
        relayed = len(self.specs) > 1 or log_fd is not None
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
    def _turn(self) -> None:
        waiting_for_time = self.phase is not Phase.RUNNING or any(r.relay and r.relay.holding for r in self.ranks)
        events = self._selector.select(0.05 if waiting_for_time else 1.0)
        for number in self._wakeup.take():
            self._on_signal(number)
        # Exits before output: a rank that was killed must be seen before the traceback of the one that missed it.
        self._look_for_exits()
        now = time.monotonic()
        for key, _ in events:
            if key.data is not None:
                self._read(key.data, now)
        if not events:
            for rank in self.ranks:
                if rank.relay is not None:
                    rank.relay.settle()
        self._release_logged_tracebacks(now)
        self._advance(time.monotonic())

    def _look_for_exits(self) -> None:
        for rank in self.ranks:
            if rank.code is None:
                rank.code = processes.exit_status(rank.pid)
                if rank.code is not None:
                    rank.ended_at = time.monotonic()
                    rank.by_us = self.phase in (Phase.STOPPING, Phase.KILLED)
                    if rank.relay is not None:
                        # What is left in its pipe; a child of its own may still hold the other end.
                        self._read(rank.relay, rank.ended_at)
                        if rank.code == 0 or not rank.relay.holding:
                            rank.relay.release()
        if os.getpid() == 1:
            processes.reap_strangers({rank.pid for rank in self.ranks})

    def _read(self, relay: Relay, now: float) -> None:
        was_open = not relay.at_end
        relay.read(now)
        if was_open and relay.at_end:
            self._selector.unregister(relay.fd)

    def _on_signal(self, number: int) -> None:
        if number in PASSED_SIGNALS:
            processes.send(self._pids(), number)
        elif number in STOPPING_SIGNALS:
            name = signal.Signals(number).name
            if self.signal_received is not None:
                self.say("info", f"{name} again: killing all processes")
                self._stop(signal.SIGKILL)
                return
            self.signal_received = number
            if self.phase in (Phase.RUNNING, Phase.FAILED):
                self.say("info", f"{name}: forwarded to {len(self.ranks)} processes; they have "
                         f"{self.patience.after_signal_s:g} s to end, a second signal kills them now")
                self._stop(number)

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

    def _advance(self, now: float) -> None:
        if self.phase is Phase.RUNNING:
            if any(rank.failed for rank in self.ranks):
                self.phase, self.deadline = Phase.FAILED, now + self.patience.settle_s
            elif all(rank.code == 0 for rank in self.ranks):
                # What the ranks have left running would be orphans.
                self._stop(signal.SIGTERM)
        if self.phase is Phase.FAILED:
            begun = min(rank.failed_at() for rank in self.ranks if rank.failed)
            older = any(r.code is None and r.relay and r.relay.holding and r.relay.held_since < begun
                        for r in self.ranks)
            if not older or now >= self.deadline:
                self._stop(signal.SIGTERM)
        if self.phase is Phase.STOPPING and now >= self.deadline:
            self._stop(signal.SIGKILL)

    def _stop(self, number: int) -> None:
        patience = self.patience
        processes.send(self._pids(), number)
        if number == signal.SIGKILL:
            self.phase, wait_s = Phase.KILLED, patience.after_kill_s
        else:
            self.phase = Phase.STOPPING
            wait_s = patience.after_signal_s if self.signal_received == number else patience.after_failure_s
        self.deadline = time.monotonic() + wait_s

    # --- the end -----------------------------------------------------------------------------------------------------
    def _finished(self) -> bool:
        if self.phase in (Phase.RUNNING, Phase.FAILED):
            return False
        left = processes.members(self._pids())
        if all(rank.code is not None for rank in self.ranks) and not left:
            return True
        if self.phase is Phase.KILLED and time.monotonic() > self.deadline:
            self.say("error", f"processes that SIGKILL does not end, stuck in the kernel: {left}")
            return True
        return False

    def _pids(self) -> set[int]:
        return {rank.pid for rank in self.ranks}

    def _reap_all(self, guard: Guard) -> None:
        if any(rank.code is None for rank in self.ranks):  # an error brought us here
            processes.send(self._pids(), signal.SIGKILL)
        for rank in self.ranks:
            if rank.relay is not None:
                rank.relay.close()
                if rank.relay.log_fd is not None:
                    os.close(rank.relay.log_fd)
            guard.forget(rank.pid)
            try:
                rank.process.wait(timeout=1)
            except subprocess.TimeoutExpired:
                pass  # said above

    def _report(self) -> int:
        """Print the one traceback that matters, a line for each other failure; returns the job's exit code."""
        failed = sorted((r for r in self.ranks if r.failed), key=lambda r: (r.by_us, r.failed_at(), r.spec.rank))
        for rank in self.ranks:
            if rank.relay and not rank.failed:
                rank.relay.release()
        if not failed:
            return 0
        if any(rank.relay and rank.relay.mid_line for rank in self.ranks):
            write_stderr(b"\n")
        first = failed[0]
        if self.signal_received is not None and first.by_us:
            if first.relay:
                write_stderr(first.relay.take_held())
            self.say("info", f"stopped by {signal.Signals(self.signal_received).name}")
            # Ranks that had to be killed did not choose an exit code: the job ended by the signal it was sent.
            return 128 + self.signal_received if first.code == -signal.SIGKILL else shell_code(first.code)
        self._report_failure(first, failed[1:])
        return shell_code(first.code)

    def _report_failure(self, first: Rank, others: list[Rank]) -> None:
        self.say("error", f"rank {first.spec.rank} (process {first.pid}) failed first: {describe(first.code)}")
        if first.relay:
            text = first.relay.take_held()
            if not text and first.relay.failed_at is not None:
                self.say("error", "its traceback is above; it needed long to end")
            write_stderr(text if text.endswith(b"\n") or not text else text + b"\n")
        for rank in others:
            text = rank.relay.take_held() if rank.relay else b""
            if text or not rank.by_us:
                why = last_line(text) or describe(rank.code)
                self.say("error", f"rank {rank.spec.rank} then failed too (its traceback is left out): {why}")
        if first.spec.log_path is not None:
            self.say("error", f"its whole output is in {first.spec.log_path}")


class StartError(Exception):
    """A rank's program cannot be started. ``code`` is what a shell would exit with."""

    def __init__(self, message: str, error: OSError) -> None:
        super().__init__(message)
        self.code = 127 if isinstance(error, FileNotFoundError) else 126


def shell_code(code: int) -> int:
    """Exit code as a shell reports it: 128 + N for a death by signal N."""
    return 128 - code if code < 0 else code


def describe(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = "a real-time signal"
    hint = "; on a machine out of memory the kernel does this, see dmesg" if code == -signal.SIGKILL else ""
    return f"killed by signal {-code} ({name}){hint}"


class _SignalPipe:
    """Signals as bytes in a pipe, so that the loop handles them one after another at its own time."""

    def __init__(self) -> None:
        self.read_end, self._write_end = os.pipe()
        os.set_blocking(self.read_end, False)
        os.set_blocking(self._write_end, False)
        self._old_fd = signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        self._old = {}
        for number in (*STOPPING_SIGNALS, *PASSED_SIGNALS, signal.SIGCHLD):
            # Under nohup SIGHUP is ignored, in a script's background job SIGINT: that was somebody's wish.
            if number == signal.SIGCHLD or signal.getsignal(number) is not signal.SIG_IGN:
                self._old[number] = signal.signal(number, lambda *_: None)

    def take(self) -> list[int]:
        try:
            return list(os.read(self.read_end, 4096))
        except BlockingIOError:
            return []

    def close(self) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._old_fd)
        os.close(self.read_end)
        os.close(self._write_end)
