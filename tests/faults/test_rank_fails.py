# SPDX-License-Identifier: Apache-2.0
"""A rank fails: the job ends with its exit code and its traceback, soon and completely."""

import os
import signal

import pytest

from tests.faults.job import Job, run

HEADER = "Traceback (most recent call last)"


def test_first_failure_is_the_jobs_and_its_traceback_is_shown_once(tmp_path):
    code, _, err = run(tmp_path, """
        if rank == 1:
            class Odd(Exception): pass
            def deep(): raise Odd("the cause\\nin two lines")
            try: deep()
            except Odd:
                sys.excepthook(*sys.exc_info()); mark("raised"); sys.exit(3)
        wait_for("raised")
        raise RuntimeError("rank 1 is gone")
        """)
    assert code == 3
    assert err.count(HEADER) == 1 and "Odd: the cause\nin two lines" in err and "in deep" in err
    assert "rank 1 (process" in err and "failed first: exit code 3" in err


def test_consequences_are_one_line_each(tmp_path):
    code, _, err = run(tmp_path, """
        if rank == 0:
            mark("raising")
            raise ValueError("the cause")
        wait_for("raising")
        raise RuntimeError(f"rank 0 is gone, says {rank}")
        """, flags=("--num_gpus", "4"))
    assert code == 1 and err.count(HEADER) == 1 and "ValueError: the cause" in err
    assert "rank 0 (process" in err
    for line in err.splitlines():
        if "rank 0 is gone" in line:
            assert "then failed too (its traceback is left out): RuntimeError" in line


def test_tracebacks_as_torch_prints_them(tmp_path):
    """With a process group torch puts "[rankN]: " in front of each line, in pieces."""
    code, _, err = run(tmp_path, """
        def hook(kind, error, trace):
            import traceback
            for line in traceback.format_exception(kind, error, trace):
                for part in line.splitlines(keepends=True): sys.stderr.write(f"[rank{rank}]: "); sys.stderr.write(part)
        sys.excepthook = hook
        if rank == 1: wait_for("raising")
        mark("raising")
        raise ValueError(f"trouble {rank}")
        """)
    assert code == 1 and err.count(HEADER) == 1
    assert f"[rank0]: {HEADER}" in err and "[rank0]: ValueError: trouble 0" in err and "[rank1]" not in err


def test_chained_tracebacks_are_kept_together(tmp_path):
    code, _, err = run(tmp_path, """
        if rank == 1:
            try: {}["key"]
            except KeyError as error: raise ValueError("outer") from error
        time.sleep(20)
        """)
    assert code == 1 and err.count(HEADER) == 2
    assert err.index("KeyError: 'key'") < err.index("direct cause") < err.index("ValueError: outer")


def test_a_slow_teardown_does_not_make_the_cause_a_consequence(tmp_path):
    """Rank 0 raises first but needs half a second to exit; rank 1 notices and is faster."""
    code, _, err = run(tmp_path, """
        import atexit
        if rank == 0:
            atexit.register(lambda: (time.sleep(0.9), os._exit(5)))
            mark("raising")
            raise ValueError("the cause")
        wait_for("raising")
        raise RuntimeError("consequence")
        """)
    assert code == 5 and "rank 0 (process" in err and "ValueError: the cause" in err
    assert err.count(HEADER) == 1


def test_a_very_slow_teardown_shows_one_traceback_too(tmp_path):
    """Both raise, and both need longer to exit than a logged traceback is held."""
    code, _, err = run(tmp_path, """
        import atexit
        atexit.register(time.sleep, 3 + 0.5 * rank)
        if rank == 1: wait_for("raising")
        mark("raising")
        raise ValueError(f"trouble {rank}")
        """)
    assert code == 1 and err.count(HEADER) == 1 and "ValueError: trouble 0" in err
    assert "rank 0 (process" in err and "its traceback is above" in err


def test_the_same_mistake_on_all_ranks_is_shown_once(tmp_path):
    code, _, err = run(tmp_path, "import no_such_module_at_all", flags=("--num_gpus", "3"))
    assert code == 1 and err.count(HEADER) == 1


def test_a_script_that_does_not_compile_is_shown_once(tmp_path):
    code, _, err = run(tmp_path, "def broken(:\n")
    assert code == 1 and err.count("SyntaxError") <= 2 and err.count("def broken(:") == 1


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT, signal.SIGTERM])
def test_death_by_signal(tmp_path, number):
    code, _, err = run(tmp_path, f"""
        if rank == 1: os.kill(os.getpid(), {int(number)})
        time.sleep(20)
        """)
    assert code == 128 + number
    assert f"rank 1 (process" in err and f"killed by signal {int(number)} ({number.name})" in err


@pytest.mark.parametrize("code", [1, 2, 77, 255])
def test_exit_codes_pass_through(tmp_path, code):
    assert run(tmp_path, f"sys.exit({code} if rank == 0 else 0)")[0] == code


def test_a_single_rank_fails(tmp_path):
    code, _, err = run(tmp_path, "raise ValueError('alone')", flags=("--num_gpus", "1"))
    assert code == 1 and err.count(HEADER) == 1 and "failed first: exit code 1" in err


def test_the_others_are_gone_in_time_even_if_they_refuse(tmp_path):
    """Rank 0 and its child ignore SIGTERM."""
    with Job(tmp_path, """
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if rank == 0:
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], preexec_fn=lambda:
                                     signal.signal(signal.SIGTERM, signal.SIG_IGN))
            note(child.pid, "-child")
            time.sleep(60)
        while not [name for name in os.listdir(os.environ["TEST_DIR"]) if "-child" in name]: time.sleep(0.01)
        mark("failing")
        os._exit(9)
        """) as job:
        job.wait_for_pids(3)
        job.wait_for_mark("failing")
        assert job.survivors(within_s=5 - job.age_of("failing")) == []
        assert job.finish()[0] == 9


def test_no_orphans_after_success(tmp_path):
    """What a rank leaves running in its session is ended with the job."""
    code, _, _ = run(tmp_path, """
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        note(child.pid, "-child")
        """)
    assert code == 0


def test_repeated_kills_leave_nobody(tmp_path):
    """20 times: kill one rank at an arbitrary moment; the other has a child in a group of its own."""
    for attempt in range(20):
        directory = tmp_path / str(attempt)
        directory.mkdir()
        with Job(directory, """
            if rank == 1:
                child = subprocess.Popen(["sleep", "60"], process_group=0) if sys.version_info >= (3, 11) else \\
                    subprocess.Popen(["sleep", "60"], preexec_fn=os.setpgrp)
                note(child.pid, "-child")
            time.sleep(60)
            """) as job:
            job.wait_for_pids(3)
            rank0 = next(int(path.name.split(".")[1]) for path in directory.glob("0.*.pid"))

            os.kill(rank0, signal.SIGKILL)
            code, _, err = job.finish(10)
            assert code == 137 and job.survivors() == [] and "rank 0" in err
