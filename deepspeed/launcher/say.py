# SPDX-License-Identifier: Apache-2.0
"""What the launcher writes to stderr: its own few words, and what the ranks write there.

Note [Nobody reads]
    A pipe that nobody empties, or a terminal stopped with Ctrl-S, blocks whoever writes to it. The launcher's loop must
    not be blocked: it has signals to pass on, ends of ranks to notice and signs of life to send. So while it runs a
    thread of its own does the writing, and the loop stops reading from a rank of which too much is waiting: the rank
    then waits in its own write, as it would without a launcher. (A non-blocking stderr is no way out: it would be
    non-blocking for everybody that shares it, the ranks and the user's shell among them.)
"""

from __future__ import annotations

import os
import select
import sys
import threading
from collections import deque

LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40, "critical": 50}
_PIECE_BYTES = 4096  # what a pipe takes whole


class Terminal:
    """stderr. Between :meth:`start` and :meth:`stop` writing never blocks the caller."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._queue: deque[tuple[bytes, object]] = deque()
        self._waiting: dict[object, int] = {}
        self._thread: threading.Thread | None = None
        self._ending = False
        self._given_up = False

    def write(self, data: bytes, source: object = None) -> None:
        """``source``: the one of several whose words these are; None for the launcher itself."""
        if self._thread is None:
            _write_now(data)
            return
        with self._changed:
            if data and not self._given_up:
                self._queue.append((data, source))
                self._waiting[source] = self._waiting.get(source, 0) + len(data)
                self._changed.notify_all()

    def waiting(self, source: object) -> int:
        """Bytes of a source that have not been written yet."""
        with self._changed:
            return self._waiting.get(source, 0)

    def start(self) -> None:
        try:
            fd = sys.stderr.fileno()
            sys.stderr.flush()
        except (AttributeError, OSError, ValueError):
            return  # there is none that could block
        self._ending = self._given_up = False
        self._thread = threading.Thread(target=self._run, args=(fd, ), daemon=True)
        self._thread.start()

    def stop(self, patience_s: float = 2.0) -> None:
        """Write what is waiting. If that takes too long, what the ranks have said is left out for the launcher's own
        words, which say how the job has ended; in the end those are, too."""
        if self._thread is None:
            return
        with self._changed:
            self._ending = True
            self._changed.notify_all()
            if not self._changed.wait_for(self._empty, patience_s):
                left_out = sum(len(data) for data, source in self._queue if source is not None)
                self._queue = deque(entry for entry in self._queue if entry[1] is None)
                if left_out:
                    note = f"[deepspeed] {left_out} bytes of the ranks' output are left out: nobody has read them in time\n"
                    self._queue.append((note.encode(), None))
                self._given_up = not self._changed.wait_for(self._empty, patience_s)
                self._queue.clear()
            self._waiting.clear()
        if not self._given_up:  # else it is stuck in a write, and further words are dropped
            self._thread.join()
            self._thread = None

    def _empty(self) -> bool:
        return not self._queue

    def _run(self, fd: int) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._ending)
                if not self._queue:
                    return
                entry = data, source = self._queue[0]
            for start in range(0, len(data), _PIECE_BYTES):
                _write_to(fd, data[start:start + _PIECE_BYTES])
                with self._changed:
                    if not self._queue or self._queue[0] is not entry:
                        break  # left out meanwhile
            with self._changed:
                if self._queue and self._queue[0] is entry:
                    self._queue.popleft()
                    self._waiting[source] = self._waiting.get(source, 0) - len(data)
                self._changed.notify_all()


def _write_to(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(fd, view):]
        except BlockingIOError:  # somebody made it so
            select.select([], [fd], [])
        except OSError:
            return  # stderr is gone; the job does not depend on it


def _write_now(data: bytes) -> None:
    try:
        sys.stderr.write(data.decode(errors="replace"))
        sys.stderr.flush()
    except (AttributeError, OSError, ValueError):
        pass  # nobody reads stderr any more; the job itself goes on


terminal = Terminal()


class Voice:
    """Writes ``[deepspeed] ...`` lines to stderr from the chosen level up. Not the library's logger: that one belongs to the ranks."""

    def __init__(self, level: str = "info") -> None:
        self.threshold = LEVELS[level]

    def __call__(self, level: str, message: str) -> None:
        if LEVELS[level] >= self.threshold:
            terminal.write(f"[deepspeed] {message}\n".encode(errors="replace"))
