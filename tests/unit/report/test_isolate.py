# SPDX-License-Identifier: Apache-2.0
"""No probe can crash or hang the report, or leave a process behind."""
import ctypes
import os
import select
import signal
import subprocess
import sys
import time

import pytest

from deepspeed.report.facts import Fact, no, yes
from deepspeed.report.isolate import Probe, run


PATIENCE_S = 30.0  # only a machine that stands still takes that long


def fine():
    return [yes("two", 1 + 1), Fact("text", "ü")]


def segfault():
    ctypes.string_at(0)


def hang():
    while True:
        time.sleep(1000)


def hang_deaf():
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    hang()


def leave():
    os._exit(3)


def exit_python():
    sys.exit("no")


def abort_loudly():
    os.write(2, b"driver: all is lost\n")
    os.abort()


def print_much():
    os.write(1, b"x" * 1000)
    return [Fact("much", "y" * 500_000)]


def run_all(**functions):
    """In a process without threads, as the report is."""
    return run([Probe(name, function, PATIENCE_S) for name, function in functions.items()])


@pytest.mark.parametrize("bad, status, message", [
    (segfault, "crashed", "killed by SIGSEGV"), (leave, "crashed", "ended with code 3"), (exit_python, "raised", "SystemExit: no"),
    (abort_loudly, "crashed", "killed by SIGABRT: driver: all is lost"),
])
def test_a_bad_probe_harms_only_itself(bad, status, message):
    outcomes = run_all(before=fine, bad=bad, after=fine)
    assert list(outcomes) == ["before", "bad", "after"]
    assert outcomes["bad"].status == status and message in outcomes["bad"].message and outcomes["bad"].facts == []
    assert outcomes["before"].facts == outcomes["after"].facts == fine()


@pytest.mark.parametrize("bad", [hang, hang_deaf])
def test_a_hanging_probe_is_ended(bad):
    begin_s = time.monotonic()
    outcomes = run([Probe("bad", bad, 0.3), Probe("good", fine, PATIENCE_S)])
    assert time.monotonic() - begin_s < PATIENCE_S
    assert outcomes["bad"].status == "timeout" and "0.3 s" in outcomes["bad"].message
    assert outcomes["good"].status == "ok"


def test_long_answers_and_stray_output(capfd):
    assert len(run_all(much=print_much)["much"].facts[0].value) == 500_000
    assert capfd.readouterr() == ("", "")


class Spawner:
    """Starts a child that outlives the probe, and says its number."""

    def __init__(self, hangs):
        self.hangs = hangs
        self.read_end, self.write_end = os.pipe()

    def __call__(self):
        child = subprocess.Popen(["sleep", "1000"])
        os.write(self.write_end, str(child.pid).encode())
        if self.hangs:
            hang()
        return []


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("hangs", [False, True])
def test_what_a_probe_started_goes_with_it(hangs):
    spawner = Spawner(hangs)
    for limit_s in (1.0, 5.0, PATIENCE_S) if hangs else (PATIENCE_S,):  # a hanging one uses its time up: a busy machine gets more
        run([Probe("spawner", spawner, limit_s)])
        if select.select([spawner.read_end], [], [], 0)[0]:
            break
    pid = int(os.read(spawner.read_end, 20))
    deadline_s = time.monotonic() + PATIENCE_S
    while alive(pid) and time.monotonic() < deadline_s:
        time.sleep(0.01)
    assert not alive(pid)


def test_no_descriptor_is_left():
    before = os.listdir("/proc/self/fd")
    run_all(good=fine, bad=segfault)
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_what_does_not_work_needs_advice():
    with pytest.raises(ValueError, match="'gpu'.*advice"):
        no("gpu", "none", "")
