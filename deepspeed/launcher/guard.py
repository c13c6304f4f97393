# SPDX-License-Identifier: Apache-2.0
"""Ends the ranks' process groups when the launcher dies without being able to.

Note [The launcher is killed]
    A SIGKILL leaves the launcher no chance to clean up. Each rank asks the kernel to be killed with its parent
    (PR_SET_PDEATHSIG), but that reaches only the rank itself, not what it has started: a script under a shell
    (--no_python), data loader workers, compilers. So the launcher forks this guard first. The guard sleeps on a pipe
    whose other end only the launcher holds; the kernel closes that end however the launcher dies, and the guard then
    kills the groups that were registered and not signed off.
"""

from __future__ import annotations

import os
import signal


class Guard:
    """The launcher's side. ``watch`` before a group matters, ``forget`` before its leader is reaped: from then on
    the kernel may give its number to a stranger."""

    def __init__(self) -> None:
        read_end, self._write_end = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._write_end)
            _guard(read_end)
        os.close(read_end)

    def _send(self, line: str) -> None:
        try:
            os.write(self._write_end, line.encode())
        except OSError:
            pass  # the guard itself was killed; the ranks' death signals remain

    def watch(self, group: int) -> None:
        self._send(f"+{group}\n")

    def forget(self, group: int) -> None:
        self._send(f"-{group}\n")

    def close(self) -> None:
        """The job has ended in order; nothing is watched any more."""
        os.close(self._write_end)
        try:
            os.waitpid(self.pid, 0)
        except ChildProcessError:
            pass


def _guard(read_end: int) -> None:
    try:
        os.setsid()  # out of reach of the terminal's Ctrl-C and of a kill of the launcher's group
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):  # whoever reads the launcher's output shall not wait for the guard
            os.dup2(null, fd)
        groups: set[int] = set()
        text = b""
        while chunk := os.read(read_end, 4096):
            *lines, text = (text + chunk).split(b"\n")
            for line in lines:
                (groups.add if line[:1] == b"+" else groups.discard)(int(line[1:]))
        for group in groups:
            try:
                os.killpg(group, signal.SIGKILL)
            except ProcessLookupError:
                pass
    finally:
        os._exit(0)
