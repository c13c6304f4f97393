# SPDX-License-Identifier: Apache-2.0
"""Jobs on two hosts, which are network namespaces of this machine: their ranks, their failures, their end."""

import os
import shutil
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.faults.hosts import Hosts, HostsJob, why_not
from tests.faults.job import PREAMBLE
from tests.parity import tiny
from tests.parity.launch import run

pytestmark = pytest.mark.skipif(why_not() is not None, reason=why_not() or "")

HEADER = "Traceback (most recent call last)"
WAIT = PREAMBLE + "time.sleep(100)\n"
WHO = PREAMBLE + """
names = "RANK LOCAL_RANK WORLD_SIZE LOCAL_SIZE CROSS_RANK CROSS_SIZE MASTER_ADDR MASTER_PORT".split()
import socket
print("I am", *(os.environ[name] for name in names), socket.gethostname(), os.getcwd(), *sys.argv[1:])
print("mpi", any(name.startswith(("OMPI_", "PMI_")) for name in os.environ))
"""


@pytest.fixture(scope="module")
def hosts():
    with Hosts() as two:
        yield two


@pytest.fixture
def wrapper(hosts):
    """A program that is ssh as MPI and Slurm call it."""
    path = hosts.folder / "ssh"
    path.write_text(f'#!/bin/sh\nexec /usr/bin/ssh -F {hosts.folder}/ssh_config "$@"\n')
    path.chmod(0o755)
    return path


def fake_srun(folder, wrapper):
    """Runs the command on the hosts of --nodelist, numbered as Slurm likes: not in the order of the hostfile."""
    path = folder / "srun"
    path.write_text(f"""#!/usr/bin/env python3
import shlex, subprocess, sys
flags = [word for word in sys.argv[1:] if word.startswith("--")]
command = sys.argv[1 + len(flags):]
nodes = next(f for f in flags if f.startswith("--nodelist=")).split("=")[1].split(",")[::-1]
started = [subprocess.Popen(["{wrapper}", node, shlex.join(["env", f"SLURM_PROCID={{i}}", f"SLURMD_NODENAME={{node}}", *command])])
           for i, node in enumerate(nodes)]
sys.exit(max(process.wait() for process in started))
""")
    path.chmod(0o755)
    return {"PATH": f"{folder}:{os.environ['PATH']}"}


def _needs(*programs):
    missing = [program for program in programs if shutil.which(program) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


@pytest.mark.parametrize("launcher", [
    "ssh",
    pytest.param("pdsh", marks=_needs("pdsh")),
    pytest.param("openmpi", marks=_needs("mpirun.openmpi")),
    pytest.param("mpich", marks=_needs("mpiexec.mpich")),
    "slurm",
])  # yapf: disable
def test_ranks_know_who_they_are(hosts, wrapper, tmp_path, launcher):
    more = {"openmpi": ["--launcher_args", f"--mca plm_rsh_agent {wrapper}"], "mpich": ["--launcher_args", f"-launcher-exec {wrapper}"]}
    env = fake_srun(tmp_path, wrapper) if launcher == "slurm" else {}
    with HostsJob(hosts, tmp_path, WHO, ["--launcher", launcher, *more.get(launcher, [])], slots=2, env=env) as job:
        code, out, err = job.finish()
        assert code == 0 and job.survivors(2) == [], (out, err)
    found = sorted(line.split("I am ")[1] for line in out.splitlines() if "I am" in line)
    first, address = hosts.names[0], hosts.addresses[0]
    assert found == [f"{rank} {rank % 2} 4 2 {rank // 2} 2 {address} 29500 {hosts.names[rank // 2]} {tmp_path} --local_rank={rank % 2}"
                     for rank in range(4)]
    assert "mpi True" not in out
    assert launcher != "pdsh" or f"{first}: I am" in out


def test_filters_core_binding_logs_and_the_environment_file(hosts, tmp_path, monkeypatch):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / ".deepspeed_env").write_text("DS_TEST_COLOUR=red\nDS_TEST_WORDS=two words and a 'quote'\nTEST_DIR=nowhere\n")
    flags = ["--launcher", "ssh", "--include", f"{hosts.names[0]}:1@{hosts.names[1]}:0,1", "--bind_core_list", "0-1",
             "--enable_each_rank_log", "logs", "--no_local_rank"]
    script = PREAMBLE + """
print("said", rank, os.environ["DS_TEST_COLOUR"], os.environ["DS_TEST_WORDS"], len(os.sched_getaffinity(0)), sys.argv[1:])
"""
    with HostsJob(hosts, tmp_path, script, flags, slots=2, env={"HOME": str(tmp_path / "home"), "DS_TEST_COLOUR": "blue"}) as job:
        code, out, err = job.finish()
    assert code == 0 and "said" not in out, err
    logs = sorted((path.name[-9:], path.read_text()) for path in (tmp_path / "logs").iterdir())
    assert logs == [(f"rank{rank}.log", f"said {rank} red two words and a 'quote' {2 if rank == 0 else 1} []\n") for rank in range(3)]


def test_a_busy_port_is_replaced_for_all(hosts, tmp_path):
    holder = subprocess.Popen([*hosts.inside(hosts.names[0]), "python3", "-c", "import socket, sys; s = socket.create_server(('', 29500)); "
                               "print(flush=True); sys.stdin.read()"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    holder.stdout.readline()
    try:
        with HostsJob(hosts, tmp_path, WHO) as job:
            code, out, err = job.finish()
    finally:
        holder.stdin.close()
        holder.wait()
        holder.stdout.close()
    ports = {line.split()[9] for line in out.splitlines() if "I am" in line}
    assert code == 0 and len(ports) == 1 and ports != {"29500"}
    assert f"port 29500 is in use on {hosts.names[0]}; the processes meet on port {ports.pop()} instead" in err


def test_first_failure_is_told_once_with_host_and_rank(hosts, tmp_path):
    script = PREAMBLE + """
if rank == 3:
    mark("raising")
    try: raise ValueError("the cause")
    finally: os.environ["never"] = "shown"
wait_for("raising")
raise RuntimeError("rank 3 is gone")
"""
    with HostsJob(hosts, tmp_path, script, slots=2) as job:
        code, _, err = job.finish()
        assert job.survivors(1) == []
    assert code == 1 and err.count(HEADER) == 1 and "ValueError: the cause" in err
    assert f"on {hosts.names[1]}) failed first: exit code 1" in err and "rank 3 (process" in err
    assert err.count("then failed too (its traceback is left out): RuntimeError: rank 3 is gone") <= 3


def _ranks_of(job):
    found = []
    for pid in job.processes():
        try:
            found += [pid] * (b"\0RANK=" in b"\0" + Path(f"/proc/{pid}/environ").read_bytes())
        except OSError:
            pass  # it has ended meanwhile
    return found


def test_a_killed_rank_gives_128_and_its_signal(hosts, tmp_path):
    with HostsJob(hosts, tmp_path, PREAMBLE + """
for number in (signal.SIGINT, signal.SIGTERM): signal.signal(number, signal.SIG_IGN)
if rank == 2:
    wait_for("up0"); wait_for("up1"); mark("killing"); os.kill(os.getpid(), signal.SIGSEGV)
mark(f"up{rank}")
time.sleep(100)
""", slots=2) as job:
        job.wait_for("killing")
        end = time.monotonic() + 5 - (time.time() - (tmp_path / "killing").stat().st_mtime)
        while left := _ranks_of(job):
            assert time.monotonic() < end, left
            time.sleep(0.02)
        code, _, err = job.finish(20)
        assert code == 128 + signal.SIGSEGV and job.survivors(0) == []
    assert f"on {hosts.names[1]}) failed first: killed by signal 11 (SIGSEGV)" in err


def test_a_signal_reaches_the_ranks_of_all_hosts_and_they_may_save(hosts, tmp_path):
    with HostsJob(hosts, tmp_path, PREAMBLE + """
def save(*_):
    time.sleep(1); mark(f"saved{rank}"); sys.exit(7)
signal.signal(signal.SIGTERM, save)
mark(f"ready{rank}")
time.sleep(100)
""", slots=2) as job:
        job.wait_for("ready*", 4)
        job.process.terminate()
        code, _, err = job.finish(20)
        assert code == 7 and job.survivors(0) == [] and len(list(tmp_path.glob("saved*"))) == 4
    assert "SIGTERM: forwarded to 2 hosts" in err and err.count(HEADER) == 0


def test_a_host_that_cannot_be_reached_is_named(hosts, tmp_path):
    with HostsJob(hosts, tmp_path, WHO, ["--launcher", "ssh", "--ssh_port", "1"]) as job:
        code, out, err = job.finish(20)
    assert code == 1 and "I am" not in out
    for name in hosts.names:
        assert f"host {name}" in err and f"try: ssh {name} true" in err
    assert "its launcher did not start: ssh ended with exit code 255" in err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_while_a_host_does_not_answer(hosts, tmp_path, number):
    """One is ready and waits; the connection to the other hangs."""
    (tmp_path / "config").write_text(f"Include {hosts.folder}/ssh_config\nHost {hosts.names[1]}\n"
                                     f"  ProxyCommand sh -c 'touch {tmp_path}/hanging; exec sleep 100'\n")
    flags = ["--launcher", "ssh", "--launcher_args", f"-F {tmp_path}/config", "--log_level", "debug"]
    with HostsJob(hosts, tmp_path, WHO, flags) as job:
        job.wait_for("hanging")
        for line in job.process.stderr:
            if f"host {hosts.names[0]} is ready" in line:
                break
        job.process.send_signal(number)
        code, out, err = job.finish(20)
        assert code == 128 + number and "I am" not in out and job.survivors(1) == [], err
        assert f"stopped by {number.name} before the hosts were ready" in err


def test_a_program_that_is_not_there(hosts, tmp_path):
    with HostsJob(hosts, tmp_path, WHO, ["--launcher", "ssh", "--no_python", "--no_local_rank", "/no/such/program"]) as job:
        code, _, err = job.finish(20)
        assert code == 1 and job.survivors(1) == []
    assert "cannot start /no/such/program: No such file or directory" in err and "failed first: rank " in err


def _pid_of(job, words, variable="DS_TEST_MARK"):
    """The process of the job whose command line holds all of these words, and whose environment holds that variable."""
    found = [pid for pid in job.processes() if all(word in Path(f"/proc/{pid}/cmdline").read_text() for word in words)
             and any(item.startswith(variable) for item in Path(f"/proc/{pid}/environ").read_text().split("\0"))]
    parents = {pid: int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]) for pid in found}
    assert found, words
    return next(pid for pid in found if parents[pid] not in found)  # a launcher's guard is its copy


VICTIMS = {
    "the launching host's launcher": lambda job: job.process.pid,
    "a rank": lambda job: _pid_of(job, ["script.py", "--local_rank=0"], "RANK=1"),
    "the other host's launcher": lambda job: _pid_of(job, ["python", "deepspeed.launcher.launch\0--node_rank=1"]),
    "the ssh to it": lambda job: _pid_of(job, ["ServerAlive", "--node_rank=1"]),
}
EXPECTED = {"a rank": 137, "the other host's launcher": 1, "the ssh to it": 1}


def test_killed_20_times_without_a_survivor(hosts, tmp_path):
    """With SIGKILL, whoever it is; ranks have children, which no death signal of a rank reaches."""
    script = PREAMBLE + """
child = subprocess.Popen(["sleep", "100"])
mark(f"ready{rank}")
time.sleep(100)
"""
    def attempt(number):
        victim = list(VICTIMS)[number % 4]
        folder = tmp_path / str(number)
        folder.mkdir()
        with HostsJob(hosts, folder, script) as job:
            job.wait_for("ready*", 2)
            os.kill(VICTIMS[victim](job), signal.SIGKILL)
            code, _, err = job.finish(15)
            left = job.survivors(2 if victim.startswith("the launching") else 0)
            named = victim.startswith("the launching") or hosts.names[1] in err
            return None if not left and named and code == EXPECTED.get(victim, -signal.SIGKILL) else (victim, left, code, err)

    with ThreadPoolExecutor(4) as four_at_a_time:
        assert [problem for problem in four_at_a_time.map(attempt, range(20)) if problem] == []


def zero_3_losses():
    """The same training on one host."""
    engine = tiny.engine_of(tiny.tiny(), tiny.config(3))
    lines = []
    for step in range(8):
        loss = engine(tiny.batch(step))
        engine.backward(loss)
        engine.step()
        lines.append(f"loss {step} {engine.global_rank} {loss.item()}")
    return lines


TRAIN = PREAMBLE + """
import torch
import deepspeed
from tests.parity import tiny
cut_at = int(os.environ.get("DS_TEST_CUT_AT", -1))
torch.set_num_threads(1)
deepspeed.init_distributed()
engine = deepspeed.initialize(model=tiny.tiny(), config=tiny.config(3))[0]
for step in range(8):
    if step == cut_at:
        torch.distributed.barrier()
        mark(f"cutting{rank}")
        if rank == 0: wait_for("cut")
    loss = engine(tiny.batch(step))
    engine.backward(loss)
    engine.step()
    print("loss", step, rank, loss.item())
torch.distributed.destroy_process_group()
"""


def test_zero_3_on_two_hosts_gives_the_losses_of_one(hosts, tmp_path):
    with HostsJob(hosts, tmp_path, TRAIN, ["--launcher", "pdsh"] if shutil.which("pdsh") else ["--launcher", "ssh"]) as job:
        code, out, err = job.finish(90)
        assert code == 0 and job.survivors(2) == [], err
    two = sorted(line[line.index("loss"):] for line in out.splitlines() if "loss " in line)
    assert two == sorted(line for lines in run(zero_3_losses, 2) for line in lines) and len(two) == 16


def test_a_link_that_is_cut_in_the_middle_ends_the_job_on_both_sides(hosts, tmp_path):
    """Nobody is told: packets are lost, no connection breaks. DS_HOST_TIMEOUT is 4 s here."""
    with HostsJob(hosts, tmp_path, TRAIN, env={"DS_TEST_CUT_AT": "4"}) as job:
        job.wait_for("cutting*", 2, timeout_s=90)
        hosts.cut(hosts.names[1])
        try:
            begun = time.monotonic()
            (tmp_path / "cut").touch()
            code, out, err = job.finish(30)
            assert time.monotonic() - begun < 4 + 5 + 2 and code == 1
            assert f"host {hosts.names[1]} failed first: no sign of life from host {hosts.names[1]} for 4 s" in err and "cut" in err
            assert "loss 3 0" in out and "loss 4 0" not in out
            assert job.survivors(5) == []  # those beyond the cut noticed by themselves
        finally:
            hosts.mend(hosts.names[1])


ELASTIC = """
import os, signal, time, torch, torch.distributed as dist
torch.set_num_threads(1)
dist.init_process_group("gloo")
rank, world, state = dist.get_rank(), dist.get_world_size(), os.path.join(os.environ["TEST_DIR"], "state.pt")
step = torch.load(state)["step"] if os.path.exists(state) else 0
if rank == 0: print("begin", world, "at", step, flush=True)
while step < 12:
    total = torch.ones(1)
    dist.all_reduce(total)
    step += 1
    if rank == 0:
        torch.save({"step": step}, state + "~")
        os.replace(state + "~", state)
    dist.barrier()
    if (step, rank, world) == (4, 1, 3): os.kill(os.getpid(), signal.SIGKILL)
    if (step, world) == (8, 2):
        open(os.path.join(os.environ["TEST_DIR"], f"waiting{rank}"), "w").close()
        if os.environ.get("DS_TEST_CUT"): time.sleep(100)
print("end", rank, world, flush=True)
dist.destroy_process_group()
"""


def test_an_elastic_job_goes_on_without_a_killed_rank_and_without_a_lost_host(hosts, tmp_path):
    """Three ranks, of which one is killed, then two on two hosts, of which one is cut off, then one to the end."""
    flags = ["--launcher", "ssh", "--elastic_training", "--include", f"{hosts.names[0]}@{hosts.names[1]}:0"]
    with HostsJob(hosts, tmp_path, ELASTIC, flags, slots=2, env={"DS_TEST_CUT": "1"}) as job:
        job.wait_for("waiting*", 2, timeout_s=90)
        hosts.cut(hosts.names[1])
        try:
            code, out, err = job.finish(60)
            assert code == 0, err
            assert out.splitlines() == ["begin 3 at 0", "begin 2 at 4", "begin 1 at 8", "end 0 1"]
            assert f"elastic: rank 1 on {hosts.names[0]} failed: killed by signal 9" in err
            assert f"host {hosts.names[1]} is lost: no sign of life" in err and "going on with those that are left" in err
            assert job.survivors(5) == []
        finally:
            hosts.mend(hosts.names[1])
