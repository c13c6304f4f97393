# SPDX-License-Identifier: Apache-2.0
"""One rank as the kernel sees it: a session of its own, found and ended by number, never by name."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
from collections.abc import Callable, Collection
from dataclasses import dataclass

_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class RankSpec:
    """What to start for one rank."""
    rank: int
    argv: list[str]
    env: dict[str, str]
    cpus: frozenset[int] | None = None  # cores to stay on; None: all
    log_path: str | None = None  # file for stdout and stderr; None: the terminal
    label: str = ""  # what it is, if not that rank


def child_setup(cpus: frozenset[int] | None) -> Callable[[], None]:
    """What the forked child does before it becomes the rank. Everything is looked up here, in the parent: between
    fork and exec the child should do little more than system calls."""
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    launcher = os.getpid()

    def setup() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != launcher:  # it died before the line above took effect
            os._exit(1)
        if cpus is not None:
            os.sched_setaffinity(0, cpus)

    return setup


def start(spec: RankSpec, *, stdin: int | None, stdout: int | None, stderr: int | None) -> subprocess.Popen:
    """Start a rank as the leader of a new session, and so of a process group with its own number.

    A session rather than only a group: background groups may not read the terminal, but a process whose controlling
    terminal it is not may, so ``breakpoint()`` works in the rank that has stdin.
    """
    return subprocess.Popen(spec.argv, env=spec.env, stdin=stdin, stdout=stdout, stderr=stderr, start_new_session=True,
                            preexec_fn=child_setup(spec.cpus))


def exit_status(pid: int) -> int | None:
    """Exit code of a finished child (negative: the signal that killed it); None while it runs.

    The child is not reaped: as long as it is a zombie, its number, which is its group's, belongs to nobody else.
    """
    try:
        info = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:  # somebody else reaped it: the status is lost
        return 1
    if info is None:
        return None
    return info.si_status if info.si_code == os.CLD_EXITED else -info.si_status


def members(leaders: Collection[int]) -> list[int]:
    """Living processes of the leaders' groups or sessions; zombies do not count."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            fields = _stat(name)
            if fields and fields[0] not in "ZX" and (int(fields[2]) in leaders or int(fields[3]) in leaders):
                found.append(int(name))
    return found


def _stat(pid: str) -> list[str] | None:
    """state, ppid, pgrp, session, ...; None when the process is gone."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()
    except OSError:
        return None


def send(leaders: Collection[int], number: int) -> None:
    """Signal the leaders' groups, and whoever of their sessions has moved to another group (shells with job control)."""
    for leader in leaders:
        try:
            os.killpg(leader, number)
        except ProcessLookupError:
            pass
    for pid in members(leaders):
        fields = _stat(str(pid))
        if fields is not None and int(fields[2]) not in leaders:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                pass


def reap_strangers(known: set[int]) -> None:
    """As PID 1 we inherit every orphan of the container; collect those that have ended."""
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) in known:
            continue
        fields = _stat(name)
        if fields and fields[0] == "Z" and int(fields[1]) == os.getpid():
            try:
                os.waitpid(int(name), os.WNOHANG)
            except ChildProcessError:
                pass
