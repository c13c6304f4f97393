# SPDX-License-Identifier: Apache-2.0
"""What comes out of a job while it runs, and the odd circumstances a launcher is started in."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from tests.faults.job import Job, run


def read_until(stream, text, timeout_s=10):
    """Read a pipe until a text has come; says so if it takes too long."""
    os.set_blocking(stream.fileno(), False)
    got, end = b"", time.monotonic() + timeout_s
    while text not in got:
        assert time.monotonic() < end, f"{text!r} did not come, only {got!r}"
        try:
            got += os.read(stream.fileno(), 4096)
        except BlockingIOError:
            time.sleep(0.01)
    return got


FLOOD = """
        signal.signal(signal.SIGTERM, lambda *_: os._exit(5))
        mark(f"up{rank}")
        if rank == 1 and "fail" in sys.argv:
            wait_for("up0"); time.sleep(1); mark("failing"); os._exit(3)
        while True: os.write(2, b"x" * 99 + b"\\n")
        """


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_obeyed_although_nobody_reads_what_ranks_write(tmp_path, number):
    """SIGINT makes Python print a traceback first."""
    with Job(tmp_path, FLOOD.replace("signal.signal", "# ")) as job:
        job.wait_for_pids(2)
        job.wait_for_mark("up0")
        job.wait_for_mark("up1")
        time.sleep(1)  # until all pipes are full
        job.process.send_signal(number)
        assert job.survivors(within_s=5) == []
        assert job.process.wait(20) == 128 + number


def test_a_failure_ends_the_job_although_nobody_reads_what_another_rank_writes(tmp_path):
    with Job(tmp_path, FLOOD, args=["fail"]) as job:
        job.wait_for_mark("failing")
        assert job.survivors(within_s=5 - job.age_of("failing")) == []
        code, _, err = job.finish()
        assert code == 3 and "rank 1 (process" in err and "failed first: exit code 3" in err


def test_a_slow_reader_gets_all_of_it(tmp_path):
    """More than all buffers hold: the ranks wait, nothing is lost."""
    with Job(tmp_path, """
        for number in range(20): os.write(2, b"%d" % rank * 49_999 + b"\\n")
        mark(f"done{rank}")
        """) as job:
        job.wait_for_pids(2)
        time.sleep(1)
        assert not (tmp_path / "done0").exists() and not (tmp_path / "done1").exists()
        code, _, err = job.finish()
        assert code == 0 and err.count("0") >= 20 * 49_999 and err.count("1") >= 20 * 49_999


def test_a_progress_bar_is_seen_while_it_moves(tmp_path):
    with Job(tmp_path, """
        if rank == 0: sys.stderr.write("\\r 10%|#    |")
        time.sleep(20)
        """) as job:
        assert read_until(job.process.stderr, b"10%") == b"\r 10%|#    |"


def test_a_logged_traceback_of_a_living_rank_is_shown(tmp_path):
    with Job(tmp_path, """
        import logging
        if rank == 0:
            try: 1 / 0
            except ZeroDivisionError: logging.exception("carrying on")
        time.sleep(3)
        print("done")
        """) as job:
        read_until(job.process.stderr, b"carrying on\n", 3)
        read_until(job.process.stderr, b"ZeroDivisionError: division by zero\n", 5)
        assert job.process.poll() is None
        os.set_blocking(job.process.stderr.fileno(), True)
        code, out, _ = job.finish()
        assert code == 0 and out.count("done") == 2


def test_a_traceback_before_a_good_end_is_not_lost(tmp_path):
    code, _, err = run(tmp_path, """
        import traceback
        try: 1 / 0
        except ZeroDivisionError: traceback.print_exc()
        """)
    assert code == 0 and err.count("ZeroDivisionError: division by zero") == 2


def test_much_output_passes_whole(tmp_path):
    code, out, err = run(tmp_path, """
        sys.stdout.write("o" * 1_000_000); sys.stderr.write("e" * 1_000_000)
        """)
    assert code == 0 and out.count("o") == 2_000_000 and err.count("e") >= 2_000_000


def test_nobody_reads_stderr_any_more(tmp_path):
    read_end, write_end = os.pipe()
    with Job(tmp_path, """
        for _ in range(50):
            sys.stderr.write("x" * 1000); time.sleep(0.01)
        print("done")
        """, stderr=write_end) as job:
        os.close(write_end)
        os.close(read_end)
        code, out, _ = job.finish()
        assert code == 0 and out.count("done") == 2


def test_first_rank_has_stdin(tmp_path):
    with Job(tmp_path, "print(rank, repr(sys.stdin.read()))", stdin=subprocess.PIPE) as job:
        out, _ = job.process.communicate("hello", timeout=20)
        assert sorted(out.splitlines()) == ["0 'hello'", "1 ''"]


def test_ranks_see_their_environment(tmp_path):
    code, out, _ = run(tmp_path, """
        names = "RANK LOCAL_RANK WORLD_SIZE LOCAL_SIZE CROSS_RANK CROSS_SIZE MASTER_ADDR".split()
        print(*[os.environ[name] for name in names], int(os.environ["OMP_NUM_THREADS"]) >= 1,
              os.environ.get("CUDA_VISIBLE_DEVICES"), sys.argv[1:])
        """, args=("--lr", "a b"), env={"CUDA_VISIBLE_DEVICES": "7"})
    assert code == 0
    assert sorted(out.splitlines()) == [f"{r} {r} 2 2 0 1 127.0.0.1 True 7 ['--local_rank={r}', '--lr', 'a b']"
                                        for r in range(2)]


def test_busy_port_is_replaced_aloud(tmp_path):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        code, out, err = run(tmp_path, "print(os.environ['MASTER_PORT'])",
                             flags=("--num_gpus", "2", "--master_port", str(port)))
    ports = set(out.split())
    assert code == 0 and len(ports) == 1 and str(port) not in ports
    assert f"port {port} is in use; the processes meet on port {ports.pop()} instead" in err


def test_two_jobs_started_together_do_not_meet(tmp_path):
    """Neither has bound the port yet when the other looks."""
    ports = []
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    body = "print(os.environ['MASTER_PORT']); time.sleep(1)"
    with Job(tmp_path / "a", body) as one, Job(tmp_path / "b", body) as two:
        for job in (one, two):
            ports += job.finish()[1].split()
    assert len(set(ports)) == 2


def test_each_rank_has_a_log(tmp_path):
    code, out, err = run(tmp_path, """
        print("out", rank)
        sys.stderr.write(f"err {rank}\\n")
        import atexit
        atexit.register(time.sleep, 1.5 * (1 - rank))  # so that rank 1 fails too before it is ended
        if rank == 1: wait_for("raising")
        mark("raising")
        raise ValueError(f"trouble {rank}")
        """, flags=("--num_gpus", "2", "--enable_each_rank_log", str(tmp_path / "logs")))
    assert code == 1 and out == ""
    assert err.count("Traceback") == 1 and "ValueError: trouble 0" in err and "err 0" not in err
    for rank in range(2):
        log, = (tmp_path / "logs").glob(f"*_rank{rank}.log")
        for text in (f"out {rank}", f"err {rank}", "Traceback", f"ValueError: trouble {rank}"):
            assert text in log.read_text()


def test_saved_pid(tmp_path):
    with Job(tmp_path, "time.sleep(0.5)", flags=("--num_gpus", "2", "--save_pid")) as job:
        job.wait_for_pids(2)
        path = f"/tmp/{job.process.pid}.deepspeed"
        assert open(path).read() == str(job.process.pid)
        assert job.finish()[0] == 0 and not os.path.exists(path)


def test_bound_cores(tmp_path):
    cores = sorted(os.sched_getaffinity(0))
    code, out, err = run(tmp_path, "print(rank, sorted(os.sched_getaffinity(0)), os.environ['OMP_NUM_THREADS'])",
                         flags=("--num_gpus", "1", "--bind_core_list", str(cores[-1])))
    assert (code, out) == (0, f"0 [{cores[-1]}] 1\n"), err
    code, _, err = run(tmp_path, "", flags=("--num_gpus", str(len(cores) + 1), "--bind_cores_to_rank"))
    assert code == 1 and "cannot be shared out among" in err


def test_venv_script(tmp_path):
    (tmp_path / "activate").write_text("export FROM_VENV=yes\npython() { :; }\n")
    code, out, err = run(tmp_path, "print(os.environ['FROM_VENV'])",
                         flags=("--num_gpus", "2", "--venv_script", str(tmp_path / "activate")),
                         env={"PATH": os.path.dirname(sys.executable) + ":" + os.environ["PATH"]})
    assert (code, out) == (0, "yes\nyes\n"), err


def test_module_and_no_local_rank(tmp_path):
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text("")
    (tmp_path / "package" / "train.py").write_text("import os, sys; os.write(1, f'{__name__} {sys.argv[1:]}\\n'.encode())")
    script = Job(tmp_path, "")
    script.script = "package.train"
    script.flags = ("--num_gpus", "2", "--module", "--no_local_rank")
    script.args = ("x", )
    script.options["cwd"] = tmp_path
    with script as job:
        assert job.finish()[:2] == (0, "__main__ ['x']\n" * 2)


@pytest.mark.parametrize("flags,program,code,message", [
    ((), "/missing.py", 1, "/missing.py: no such file"),
    (("--no_python", ), "no-such-program", 127, "rank 0: cannot start no-such-program"),
    (("--no_python", ), "/etc/passwd", 126, "cannot start /etc/passwd"),
])
def test_nothing_to_start(tmp_path, flags, program, code, message):
    job = Job(tmp_path, "", flags=("--num_gpus", "2", *flags))
    job.script = program
    with job:
        result, _, err = job.finish()
        assert result == code and message in err and "Traceback" not in err


@pytest.mark.parametrize("quiet", [True, False])
def test_quiet(tmp_path, quiet):
    _, _, err = run(tmp_path, "", flags=("-q", ) if quiet else ())
    assert (err == "") == quiet


def test_the_parent_imports_neither_torch_nor_numpy(tmp_path):
    code, _, err = run(tmp_path, "", env={"PYTHONPROFILEIMPORTTIME": "1"})
    imported = {line.rsplit("|", 1)[-1].strip() for line in err.splitlines() if line.startswith("import time:")}
    assert code == 0 and "deepspeed.launcher.supervisor" in imported
    assert not {"torch", "numpy", "deepspeed._core", "deepspeed.engine"} & imported
