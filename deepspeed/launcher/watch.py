# SPDX-License-Identifier: Apache-2.0
"""The loop that keeps a job: it runs until all is well, something fails or a signal arrives, and then ends what is left.

Two things are kept this way: the ranks of a host (``supervisor``) and the hosts of a job (``head``).
"""

from __future__ import annotations

import enum
import os
import selectors
import signal
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass

from .guard import Guard
from .say import Voice, terminal

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
    FAILED = enum.auto()  # something has failed; the others may still say something
    STOPPING = enum.auto()  # told to end
    KILLED = enum.auto()


class Watch(ABC):
    """Run with :meth:`run`, once, from the main thread. Subclasses say what is kept (the methods that raise here)."""

    kept = "processes"

    def __init__(self, say: Voice, patience: Patience = Patience()) -> None:
        self.say = say
        self.patience = patience
        self.phase = Phase.RUNNING
        self.deadline = 0.0
        self.signal_received: int | None = None

    def run(self) -> int:
        """Returns the exit code of the job."""
        self._guard = Guard()  # before there is a second thread
        terminal.start()
        self._wakeup = _SignalPipe()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._wakeup.read_end, selectors.EVENT_READ)
        try:
            self._start_all()
            while not self._finished():
                events = self._selector.select(self._pause_s())
                for number in self._wakeup.take():
                    self._on_signal(number)
                self._look(events)
                self._advance(time.monotonic())
            return self._report()
        finally:
            self._reap_all()
            self._selector.close()
            self._wakeup.close()
            self._guard.close()
            terminal.stop()

    # --- what is kept ------------------------------------------------------------------------------------------------
    @abstractmethod
    def _start_all(self) -> None: ...

    @abstractmethod
    def _pause_s(self) -> float:
        """How long the loop may sleep when nothing happens."""

    @abstractmethod
    def _look(self, events: list) -> None:
        """Take in what has happened."""

    @abstractmethod
    def _trouble(self) -> bool: ...

    @abstractmethod
    def _all_well(self) -> bool:
        """Everything has ended with success."""

    @abstractmethod
    def _settled(self) -> bool:
        """After a failure: no older one can still come to light."""

    @abstractmethod
    def _count(self) -> int: ...

    @abstractmethod
    def _send(self, number: int) -> None: ...

    @abstractmethod
    def _left(self) -> list:
        """What has not ended yet."""

    @abstractmethod
    def _report(self) -> int: ...

    @abstractmethod
    def _reap_all(self) -> None: ...

    # --- the course of a job -----------------------------------------------------------------------------------------
    def _on_signal(self, number: int) -> None:
        if number in PASSED_SIGNALS:
            self._send(number)
        elif number in STOPPING_SIGNALS:
            name = signal.Signals(number).name
            if self.signal_received is not None:
                self.say("info", f"{name} again: killing all {self.kept}")
                self._stop(signal.SIGKILL)
                return
            self.signal_received = number
            if self.phase in (Phase.RUNNING, Phase.FAILED):
                self.say("info", f"{name}: forwarded to {self._count()} {self.kept}; they have "
                         f"{self.patience.after_signal_s:g} s to end, a second signal kills them now")
                self._stop(number)

    def _advance(self, now: float) -> None:
        if self.phase is Phase.RUNNING:
            if self._trouble():
                self.phase, self.deadline = Phase.FAILED, now + self.patience.settle_s
            elif self._all_well():
                # What has been left running would be orphans.
                self._stop(signal.SIGTERM)
        if self.phase is Phase.FAILED and (self._settled() or now >= self.deadline):
            self._stop(signal.SIGTERM)
        if self.phase is Phase.STOPPING and now >= self.deadline:
            self._stop(signal.SIGKILL)

    def _stop(self, number: int) -> None:
        patience = self.patience
        if number == signal.SIGKILL:
            self.phase, wait_s = Phase.KILLED, patience.after_kill_s
        else:
            self.phase = Phase.STOPPING
            wait_s = patience.after_signal_s if self.signal_received == number else patience.after_failure_s
        self._send(number)
        self.deadline = time.monotonic() + wait_s

    def _finished(self) -> bool:
        if self.phase in (Phase.RUNNING, Phase.FAILED):
            return False
        left = self._left()
        if not left:
            return True
        if self.phase is Phase.KILLED and time.monotonic() > self.deadline:
            self.say("error", f"{self.kept} that SIGKILL does not end, stuck in the kernel or out of reach: "
                     f"{', '.join(map(str, left))}")
            return True
        return False


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
