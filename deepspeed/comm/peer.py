# SPDX-License-Identifier: Apache-2.0
"""Another rank's process, as far as this host can see it."""
import os
import signal
import socket

_STATES = {"R": "running", "S": "sleeping", "D": "in the kernel, on a disk or a device", "T": "stopped by a signal (SIGSTOP)",
           "t": "stopped by a debugger", "Z": "dead", "X": "dead", "I": "idle"}


def _stat(pid):
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return fields[0], int(fields[19])  # state, start time in ticks: tells a process from a later one with its id


def why_silent(who):
    """Text on a process that does not answer. `who`: {"host", "pid", "start_ticks"}, or None when it never said who it is."""
    if who is None:
        return "it has not started its hang detection"
    there = f"process {who['pid']} on {who['host']}"
    if who["host"] != socket.gethostname():
        return f"{there}; look there whether it is dead, stopped or cut off"
    try:
        state, ticks = _stat(who["pid"])
    except OSError:
        return f"{there} is gone"
    if ticks != who["start_ticks"]:
        return f"{there} is gone"
    hint = ", and holds Python's lock in foreign code" if state in "RS" else ""
    return f"{there} is {_STATES.get(state, state)}{hint}"


def kill(who):
    """SIGKILL to the process, if it is on this host and still the same; a stopped process does not heed anything else."""
    if who is None or who["host"] != socket.gethostname():
        return
    try:
        fd = os.pidfd_open(who["pid"])
    except OSError:
        return
    try:
        if _stat(who["pid"])[1] == who["start_ticks"]:
            signal.pidfd_send_signal(fd, signal.SIGKILL)
    except OSError:
        pass
    finally:
        os.close(fd)
