# SPDX-License-Identifier: Apache-2.0
"""The stderr of one rank on its way to the terminal, with tracebacks held back.

Note [One traceback]
    When one rank fails, the others fail a moment later because it is gone, and N tracebacks hide the one that matters.
    So everything passes through at once (also partial lines: progress bars) until the header of a traceback appears.
    From there on the rank's stderr is held. If the rank then exits with an error, the supervisor prints the held text
    of the rank that failed first and only the last line of the others. If the rank goes on living (a traceback that
    was merely logged), the text is released after a while: soon for the rank whose traceback is the oldest, later for
    the others, which may still turn out to be consequences.
"""

from __future__ import annotations

import fcntl
import os
import re
import struct
import termios

from .say import terminal

HEADER = b"Traceback (most recent call last):"
# torch.distributed puts this in front of every line of a traceback.
_RANK = re.compile(rb"\[rank\d+\]: ?")
_PART_OF_RANK = re.compile(rb"\[(r|ra|ran|rank\d*|rank\d+\]:?)?")
# A script that does not even compile has no header: its report begins with the place.
_START = re.compile(rb"(?m)(?:" + _RANK.pattern + rb")?" + re.escape(HEADER) + rb'|^  File "')
_MAX_HELD_BYTES = 1 << 20
_READ_BYTES = 1 << 16
_MAX_WAITING_BYTES = 1 << 17  # for a terminal that is slower than the rank


def _may_become_a_header(data: bytes) -> bool:
    rank = _RANK.match(data)
    if rank is not None:
        return HEADER.startswith(data[rank.end():])
    return HEADER.startswith(data) or _PART_OF_RANK.fullmatch(data) is not None


def _unfinished_start(data: bytes) -> int:
    """Where the longest end of data begins that is the beginning of a header; len(data) when there is none."""
    for start in range(max(0, len(data) - len(HEADER) - 16), len(data)):
        if data[start] in b"[T" and _may_become_a_header(data[start:]):
            return start
    return len(data)


class Relay:
    """Reads one rank's stderr (``fd``, non-blocking) and writes it to the terminal, or to ``log_fd`` if given.

    With a log everything goes there at once, and the held text is a copy for the terminal in case the rank fails.
    """

    def __init__(self, fd: int, log_fd: int | None = None) -> None:
        self.fd = fd
        self.log_fd = log_fd
        self.held = bytearray()
        self.held_since: float | None = None  # None: not holding
        self.failed_at: float | None = None  # when the traceback began that was last held, also after its release
        self.at_end = False
        self.resting = False  # not to be read from for now, for whoever looks at many relays
        self.hurried = False  # its rank is to end: rather leave text out than let it wait for the terminal
        self.left_out = 0  # bytes
        self.mid_line = False  # what was last written to the terminal, say a progress bar, has not ended its line
        self._maybe = b""

    @property
    def holding(self) -> bool:
        return self.held_since is not None

    @property
    def backlog(self) -> float:
        """What waits to be written, as a share of what may: from 1 on the rank should wait as well."""
        return terminal.waiting(self) / _MAX_WAITING_BYTES

    def read(self, now: float) -> None:
        """Take some of what has arrived; sets ``at_end`` when the rank has closed its end. One read, since a rank may write
        as fast as it is read from, and there are others."""
        if self.at_end:
            return
        try:
            data = os.read(self.fd, _READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.close()
            return
        if self.log_fd is not None:
            os.write(self.log_fd, data)
        self._take(data, now)

    def read_rest(self, now: float) -> None:
        """Take all that has arrived up to now, which is at most what a pipe holds; for when its rank has ended."""
        if not self.at_end:
            for _ in range(_arrived(self.fd) // _READ_BYTES + 2):
                self.read(now)

    def _take(self, data: bytes, now: float) -> None:
        if self.holding:
            self.held += data
            if len(self.held) > _MAX_HELD_BYTES:
                self.release()
            return
        data = self._maybe + data
        self._maybe = b""
        start = _START.search(data)
        if start is not None:
            self._pass_on(data[:start.start()])
            self.held += data[start.start():]
            self.held_since = self.failed_at = now
            return
        end = _unfinished_start(data)
        self._maybe = data[end:]
        self._pass_on(data[:end])

    def settle(self) -> None:
        """Nothing has come for a while: what might have become a header will not."""
        self._pass_on(self._maybe)
        self._maybe = b""

    def _pass_on(self, data: bytes | bytearray) -> None:
        if self.hurried and self.backlog >= 1:
            self.left_out += len(data)
        elif self.log_fd is None and data:
            self.mid_line = data[-1:] != b"\n"
            terminal.write(bytes(data), self)

    def release(self) -> None:
        """Write what is held; go on passing through."""
        self._pass_on(self._maybe + self.held)
        self._maybe = b""
        self.held = bytearray()
        self.held_since = None

    def take_held(self) -> bytes:
        """What is held, for the supervisor to print or to leave out; nothing is held afterwards."""
        text = bytes(self.held)
        self.held = bytearray()
        self.held_since = None
        return text

    def close(self) -> None:
        if not self.at_end:
            self.at_end = True
            os.close(self.fd)


def last_line(text: bytes) -> str:
    """The line of a held text that says what went wrong: the last one of its last traceback that is not indented."""
    text = _RANK.sub(b"", text)
    after = text[text.rfind(HEADER) + 1:].decode(errors="replace").splitlines()[1:]
    for line in after:
        if line.strip() and not line[0].isspace() and line[0] not in "+|":
            return line
    return ""


# torch's warning that its store lost the connection to a rank that ended, with the C++ frames behind it.
_STORE_WARNING = re.compile(r"(?m)^(?:\[rank\d+\]: ?)?\[W[^\]\n]*TCPStore\.cpp[^\n]*\n(?:Exception raised from [^\n]*\n|frame #\d+: [^\n]*\n|<omitting python frames>\n)*\n?")


def without_store_warnings(text: str) -> str:
    """A failed rank's text without what torch adds when the rank that holds its store ends as well: a consequence, and longer than the cause."""
    return _STORE_WARNING.sub("", text)


def _arrived(fd: int) -> int:
    """Bytes in a pipe."""
    return struct.unpack("i", fcntl.ioctl(fd, termios.FIONREAD, b"\0\0\0\0"))[0]
