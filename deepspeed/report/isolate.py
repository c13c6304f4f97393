# SPDX-License-Identifier: Apache-2.0
"""Runs probes so that none can crash or hang the report.

Note [A probe's own process]: each probe runs in a forked child with a process group, a deadline and nowhere to write but a pipe. A
driver that segfaults, a library that calls exit() and a file system that never answers end that child and nothing else; what the
probe started goes with it. All run at the same time. The parent holds only the standard library, so a fork takes a millisecond; the
compiled modules are loaded in the children that need them.
"""
import ctypes
import faulthandler
import json
import os
import selectors
import signal
import sys
import time
import traceback
from typing import NamedTuple

from deepspeed.report.facts import Fact

_TAIL_BYTES = 400
_REAP_S = 0.5
_PR_SET_PDEATHSIG = 1


class Probe(NamedTuple):
    name: str
    function: object        # () -> list of Facts
    timeout_s: float = 5.0


class Outcome(NamedTuple):
    """status: "ok", "raised", "crashed" or "timeout"; message: why, when it is not "ok"."""
    status: str
    facts: list
    seconds: float
    message: str = ""


class _Running:

    def __init__(self, probe):
        self.probe, self.begin_s = probe, time.monotonic()
        self.errors = os.memfd_create("probe")
        self.results, child_end = os.pipe()
        self.text = b""
        parent = os.getpid()
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            _child(probe, child_end, self.errors, parent)
        os.close(child_end)

    @property
    def deadline_s(self):
        return self.begin_s + self.probe.timeout_s

    def read(self):
        """False at the end."""
        data = os.read(self.results, 1 << 16)
        self.text += data
        return bool(data)

    def finish(self, timed_out):
        status = self._end(timed_out)
        seconds = time.monotonic() - self.begin_s
        os.close(self.results)
        said = os.pread(self.errors, _TAIL_BYTES, max(0, os.fstat(self.errors).st_size - _TAIL_BYTES)).decode(errors="replace").strip()
        os.close(self.errors)
        if timed_out:
            return Outcome("timeout", [], seconds, f"no answer within {self.probe.timeout_s:g} s")
        try:
            answer = json.loads(self.text)
        except ValueError:
            return Outcome("crashed", [], seconds, _how_it_ended(status) + (f": {said.splitlines()[-1]}" if said else ""))
        return Outcome(answer["status"], [Fact(*fact) for fact in answer["facts"]], seconds, answer["message"])

    def _end(self, timed_out):
        """The wait status; None for a process that even SIGKILL does not end (it sits in the kernel): it is left behind."""
        give_up_s = time.monotonic() + _REAP_S
        if timed_out:
            _kill_group(self.pid)
        while time.monotonic() < give_up_s:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                _kill_group(self.pid)  # what the probe left running
                return status
            time.sleep(0.001)
        _kill_group(self.pid)
        return None


def _kill_group(pid):
    for kill in (os.killpg, os.kill):
        try:
            kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


def _how_it_ended(status):
    if status is None:
        return "did not end"
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        return f"was killed by {signal.Signals(number).name}" if number in set(signal.Signals) else f"was killed by signal {number}"
    return f"ended with code {os.WEXITSTATUS(status)} and no answer"


def _child(probe, results, errors, parent):
    """Never returns."""
    try:
        os.setpgid(0, 0)
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
        nowhere = os.open(os.devnull, os.O_RDWR)
        os.dup2(nowhere, 0)
        os.dup2(nowhere, 1)
        os.dup2(errors, 2)
        faulthandler.disable()  # a caller's would write its stack elsewhere
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        try:
            answer = {"status": "ok", "facts": [tuple(fact) for fact in probe.function()], "message": ""}
        except BaseException as error:  # SystemExit too: the answer must go out
            last = traceback.extract_tb(error.__traceback__)[-1]
            answer = {"status": "raised", "facts": [],
                      "message": f"{type(error).__name__}: {error} ({os.path.basename(last.filename)}:{last.lineno})"}
        data = json.dumps(answer, default=str).encode()
        while data:
            data = data[os.write(results, data):]
        os._exit(0)
    finally:
        os._exit(1)


def run(probes):
    """{name: Outcome} of all probes, in their order."""
    outcomes = {probe.name: None for probe in probes}
    running = [_Running(probe) for probe in probes]
    with selectors.DefaultSelector() as selector:
        for one in running:
            selector.register(one.results, selectors.EVENT_READ, one)
        while running:
            left_s = min(one.deadline_s for one in running) - time.monotonic()
            for key, _ in selector.select(max(0.0, left_s)):
                if not key.data.read():
                    selector.unregister(key.fd)
                    running.remove(key.data)
                    outcomes[key.data.probe.name] = key.data.finish(timed_out=False)
            for one in [one for one in running if time.monotonic() >= one.deadline_s]:
                selector.unregister(one.results)
                running.remove(one)
                outcomes[one.probe.name] = one.finish(timed_out=True)
    return outcomes
