# SPDX-License-Identifier: Apache-2.0
"""Signals to the launcher, and the launcher's own death."""

import os
import random
import shutil
import signal
import subprocess
import time

import pytest

from tests.faults.job import Job

SLEEP = "time.sleep(60)"
STUBBORN = """
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP): signal.signal(number, signal.SIG_IGN)
note(os.getpid(), "-ready")
time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_forwarded_and_ranks_may_take_their_time(tmp_path, number):
    with Job(tmp_path, f"""
        def save(*_):
            time.sleep(0.7); open(os.path.join(os.environ["TEST_DIR"], f"saved{{rank}}"), "w").close(); sys.exit(6)
        signal.signal({int(number)}, save)
        note(os.getpid(), "-ready")
        time.sleep(60)
        """) as job:
        job.wait_for_pids(4)
        job.process.send_signal(number)
        code, _, err = job.finish()
        assert code == 6 and job.survivors() == []
        assert (tmp_path / "saved0").exists() and (tmp_path / "saved1").exists()
        assert f"{number.name}: forwarded" in err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_ranks_that_die_of_the_signal(tmp_path, number):
    with Job(tmp_path, SLEEP) as job:
        job.wait_for_pids(2)
        time.sleep(0.2)
        job.process.send_signal(number)
        code, _, err = job.finish()
        assert code == 128 + number and job.survivors() == []
        assert err.count("Traceback") <= 1  # KeyboardInterrupt once, not once a rank


def test_ranks_that_end_well_make_a_good_exit(tmp_path):
    with Job(tmp_path, """
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        note(os.getpid(), "-ready")
        time.sleep(60)
        """) as job:
        job.wait_for_pids(4)
        job.process.terminate()
        assert job.finish()[0] == 0


def test_a_second_signal_kills_at_once(tmp_path):
    with Job(tmp_path, STUBBORN) as job:
        job.wait_for_pids(4)
        begun = time.monotonic()
        job.process.terminate()
        time.sleep(0.5)
        assert len(job.survivors()) == 4
        job.process.terminate()
        code, _, err = job.finish()
        assert code == 128 + signal.SIGTERM and time.monotonic() - begun < 5
        assert job.survivors() == [] and "SIGTERM again" in err


def test_user_signals_pass_and_end_nothing(tmp_path):
    with Job(tmp_path, """
        got = []
        signal.signal(signal.SIGUSR1, lambda *_: got.append(1))
        note(os.getpid(), "-ready")
        while not got: time.sleep(0.01)
        print("got it")
        """) as job:
        job.wait_for_pids(4)
        job.process.send_signal(signal.SIGUSR1)
        code, out, _ = job.finish()
        assert code == 0 and out.count("got it") == 2


def test_an_ignored_hangup_stays_ignored(tmp_path):
    with Job(tmp_path, "time.sleep(1); print('done')", prefix=("nohup", )) as job:
        job.wait_for_pids(2)
        job.process.send_signal(signal.SIGHUP)
        code, out, _ = job.finish()
        assert code == 0 and out.count("done") == 2


WITH_CHILD = """
child = subprocess.Popen(["sleep", "60"])
note(child.pid, "-child")
time.sleep(60)
"""


def test_killed_launcher_takes_all_with_it(tmp_path):
    """20 times, with children of the ranks, which no death signal of the ranks reaches."""
    for attempt in range(20):
        directory = tmp_path / str(attempt)
        directory.mkdir()
        with Job(directory, WITH_CHILD) as job:
            job.wait_for_pids(4)
            job.process.kill()
            job.process.wait()
            assert job.survivors(within_s=2) == []


def test_killed_in_the_middle_of_starting(tmp_path):
    for attempt in range(20):
        directory = tmp_path / str(attempt)
        directory.mkdir()
        with Job(directory, SLEEP, flags=("--num_gpus", "4")) as job:
            time.sleep(random.Random(attempt).uniform(0.03, 0.25))
            job.process.kill()
            job.process.wait()
            assert job.leftovers(within_s=5) == []


def test_ranks_behind_a_shell(tmp_path):
    """--no_python with a shell script: the rank is the shell, python is its child."""
    shell = tmp_path / "train.sh"
    shell.write_text(f"#!/bin/sh\npython3 {tmp_path}/script.py \"$@\"\necho never\n")
    shell.chmod(0o755)
    for end in ("kill", "terminate"):
        with Job(tmp_path, SLEEP, flags=("--num_gpus", "2", "--no_python", str(shell))) as job:
            job.wait_for_pids(2)
            getattr(job.process, end)()
            job.process.wait(10)
            assert job.survivors(within_s=2) == []
        for path in tmp_path.glob("*.pid"):
            path.unlink()


def _can_be_pid_1():
    command = ["unshare", "--pid", "--fork", "--mount-proc", "true"]
    return shutil.which("unshare") and subprocess.run(command, capture_output=True).returncode == 0


# exec: the launcher itself is PID 1 of the namespace, as in a container without an init.
AS_PID_1 = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")


@pytest.mark.skipif(not _can_be_pid_1(), reason="needs the right to create a PID namespace")
def test_works_as_pid_1(tmp_path):
    """Orphans that a rank leaves are handed to PID 1; they must not pile up as zombies nor be taken for ranks."""
    with Job(tmp_path, """
        assert os.getppid() == 1
        subprocess.run(["sh", "-c", "sleep 0.1 & sleep 0.1 & exit 0"], start_new_session=True)
        time.sleep(0.8)
        states = [open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0] for pid in os.listdir("/proc")
                  if pid.isdigit()]
        print("zombies", states.count("Z"))
        sys.exit(4 if rank == 1 else 0)
        """, prefix=AS_PID_1) as job:
        code, out, err = job.finish()
        assert code == 4 and out.count("zombies 0") >= 1, (out, err)


@pytest.mark.skipif(not _can_be_pid_1(), reason="needs the right to create a PID namespace")
def test_signals_as_pid_1(tmp_path):
    """PID 1 gets only the signals it has handlers for."""
    with Job(tmp_path, """
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(8))
        note(os.getpid(), "-ready")
        time.sleep(60)
        """, prefix=AS_PID_1) as job:
        job.wait_for_pids(4)
        children = open(f"/proc/{job.process.pid}/task/{job.process.pid}/children").read().split()
        os.kill(int(children[0]), signal.SIGTERM)
        assert job.finish()[0] == 8
        for path in tmp_path.glob("*.pid"):  # numbers of another namespace: not ours to look at
            path.unlink()
