# SPDX-License-Identifier: Apache-2.0
"""A launched job as a test sees it: a tiny script on N ranks, that does not import torch, and who is still alive."""

import os
import signal
import subprocess
import sys
import textwrap
import time
import uuid
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# Each script begins with this: `rank`; `note(pid)`, which writes a process down so that the test can look for it; `mark` and
# `wait_for`, which order what ranks do, however long each takes to start; and a `print` in one piece (python -u writes the
# end of a line apart, and two ranks' lines would mix).
PREAMBLE = """
import os, signal, subprocess, sys, time
rank = int(os.environ["RANK"])
def note(pid, name=""):
    path = os.path.join(os.environ["TEST_DIR"], f"{rank}.{pid}{name}.pid")
    open(path + "~", "w").close(); os.rename(path + "~", path)
note(os.getpid())
def mark(name):
    open(os.path.join(os.environ["TEST_DIR"], name), "w").close()
def wait_for(name):
    while not os.path.exists(os.path.join(os.environ["TEST_DIR"], name)): time.sleep(0.01)
    time.sleep(0.3)
def print(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())
"""


def alive(pid):
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def marked(mark):
    """All living processes with that DS_TEST_MARK in their environment."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                environ = Path(f"/proc/{name}/environ").read_bytes()
            except OSError:
                continue
            if f"DS_TEST_MARK={mark}".encode() in environ.split(b"\0") and alive(int(name)):
                found.append(int(name))
    return found


class Job:
    """`deepspeed <flags> script <args>` in a directory of its own; ended for certain when the test ends."""

    def __init__(self, directory, body, flags=("--num_gpus", "2"), args=(), prefix=(), **options):
        self.directory = Path(directory)
        self.script = self.directory / "script.py"
        self.script.write_text(PREAMBLE + textwrap.dedent(body))
        self.flags, self.args, self.prefix, self.options = flags, args, prefix, options

    def __enter__(self):
        self.mark = uuid.uuid4().hex
        env = dict(os.environ, TEST_DIR=str(self.directory), PYTHONPATH=str(ROOT), DS_ACCELERATOR="cpu", DS_TEST_MARK=self.mark)
        env.pop("OMP_NUM_THREADS", None)
        env.update(self.options.pop("env", {}))
        command = [*self.prefix, sys.executable, "-m", "deepspeed.launcher.runner", "-H", "", *self.flags]
        self.process = subprocess.Popen([*command, str(self.script), *self.args], env=env, text=True,
                                        stdin=self.options.pop("stdin", subprocess.DEVNULL), stdout=subprocess.PIPE,
                                        stderr=self.options.pop("stderr", subprocess.PIPE), **self.options)
        self.started = time.monotonic()
        return self

    def __exit__(self, *_):
        for pid in {self.process.pid, *self.pids(), *marked(self.mark)}:
            if alive(pid):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        for stream in (self.process.stdout, self.process.stderr):
            if stream is not None:
                stream.close()

    def pids(self):
        """Processes that have written themselves down."""
        return [int(path.name.split(".")[1].split("-")[0]) for path in self.directory.glob("*.pid")]

    def wait_for_pids(self, count, timeout_s=20):
        end = time.monotonic() + timeout_s
        while len(self.pids()) < count:
            assert time.monotonic() < end, f"{len(self.pids())} of {count} processes came up: {self.output()}"
            assert self.process.poll() is None, f"the job ended early: {self.output()}"
            time.sleep(0.005)
        return self.pids()

    def wait_for_mark(self, name, timeout_s=20):
        end = time.monotonic() + timeout_s
        while not (self.directory / name).exists():
            assert time.monotonic() < end, f"{name} was not marked: {self.output()}"
            time.sleep(0.005)

    def age_of(self, name):
        """Seconds since a rank has marked something."""
        return time.time() - (self.directory / name).stat().st_mtime

    def finish(self, timeout_s=30):
        """Wait for the end: (exit code, stdout, stderr)."""
        out, err = self.process.communicate(timeout=timeout_s)
        self.wall_s = time.monotonic() - self.started
        return self.process.returncode, out, err

    def output(self):
        self.process.kill()
        return self.process.communicate()

    def survivors(self, within_s=0.0):
        """Who is still alive after at most that time."""
        end = time.monotonic() + within_s
        while any(map(alive, self.pids())) and time.monotonic() < end:
            time.sleep(0.01)
        return [pid for pid in self.pids() if alive(pid)]

    def leftovers(self, within_s=0.0):
        """The same for all processes of the job, also those that had no time to write themselves down."""
        end = time.monotonic() + within_s
        while (left := marked(self.mark)) and time.monotonic() < end:
            time.sleep(0.01)
        return left


def run(directory, body, **options):
    """Run a job to its end: (exit code, stdout, stderr). Fails when it leaves a process behind."""
    with Job(directory, body, **options) as job:
        result = job.finish()
        assert job.survivors() == []
    return result
