# SPDX-License-Identifier: Apache-2.0
"""What is started for jobs on other hosts, and the environment that goes along. tests/faults/test_hosts.py starts it."""

import os
import shlex
import subprocess
import sys

import pytest

from deepspeed.launcher import exports, transport
from deepspeed.launcher.say import Voice

HOSTS = ["one", "two"]


@pytest.fixture(autouse=True)
def programs(monkeypatch):
    """Programs this machine has."""
    there = {"pdsh", "ssh", "mpirun", "mpiexec", "srun"}
    monkeypatch.setattr(transport.shutil, "which", lambda name: f"/bin/{name}" if name in there else None)
    monkeypatch.setattr(exports, "DEEPSPEED_ENVIRONMENT_PATHS", [])
    return there


def started(launcher, launcher_args="", ssh_port=None):
    return transport.transports(launcher, HOSTS, ["--world_info=abc", "train.py"], launcher_args, ssh_port, Voice("debug"))


def test_ssh_and_pdsh_start_one_process_a_host():
    ssh = started("ssh", "-l me", 22022)
    assert [t.node_ranks for t in ssh] == [[0], [1]]
    assert ssh[1].argv[-6:-1] == ["-p", "22022", "-l", "me", "two"] and "--node_rank=1 --world_info=abc train.py" in ssh[1].argv[-1]
    pdsh = started("pdsh", ssh_port=22022)
    assert pdsh[0].argv[:-1] == ["/bin/pdsh", "-S", "-w", "one"] and "-p 22022" in pdsh[0].env["PDSH_SSH_ARGS_APPEND"]
    assert pdsh[0].env["PDSH_RCMD_TYPE"] == "ssh"


@pytest.mark.parametrize("launcher,words", [
    ("openmpi", ["/bin/mpirun", "-n", "2", "--host", "one:1,two:1", "--bind-to", "none"]),
    ("mpich", ["/bin/mpirun", "-n", "2", "-ppn", "1", "-hosts", "one,two"]),
    ("impi", ["/bin/mpirun", "-n", "2", "-ppn", "1", "-hosts", "one,two"]),
    ("mvapich", ["/bin/mpirun", "-n", "2", "-ppn", "1", "-hosts", "one,two"]),
    ("slurm", ["/bin/srun", "--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--nodelist=one,two", "--cpu-bind=none"]),
])  # yapf: disable
def test_mpi_and_slurm_start_all_hosts(launcher, words):
    only, = started(launcher, "--mine 'a b'")
    place = [only.argv.index(word) for word in words]
    assert place == sorted(place) and only.node_ranks == [0, 1] and only.may_queue == (launcher == "slurm")
    assert only.argv.index("a b") < only.argv.index("/bin/sh") and "--node_rank" not in only.argv[-1]


def test_without_pdsh_it_is_ssh(programs, capsys):
    programs.remove("pdsh")
    assert started("pdsh")[0].name == "ssh" and "pdsh is not installed" in capsys.readouterr().err


def test_a_missing_program_is_named(programs):
    programs.clear()
    with pytest.raises(transport.NoTransport, match="srun is not installed or not in PATH; --launcher ssh needs only ssh"):
        started("slurm")


def test_the_command_survives_two_shells(tmp_path, monkeypatch):
    """Directory, arguments and environment with every awkward character, as ssh hands them to a login shell."""
    folder = tmp_path / "a 'b' $HOME"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "executable", "/bin/echo")
    command = transport.remote_command(["it's", "$HOME", "`ls`", "a  b"], {"NCCL_X": "it's; $HOME"})
    echoed = subprocess.run(["/bin/sh", "-c", command], capture_output=True, text=True, check=True, cwd="/").stdout
    assert echoed == "-u -m deepspeed.launcher.launch it's $HOME `ls` a  b\n"
    inner = shlex.split(shlex.split(command)[2])
    assert inner[1] == str(folder) and inner[5] == "NCCL_X=it's; $HOME"


def test_what_is_exported(tmp_path, monkeypatch):
    monkeypatch.setattr(exports, "DEEPSPEED_ENVIRONMENT_PATHS", [str(tmp_path / "home"), str(tmp_path)])
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / ".deepspeed_env").write_text("# all jobs\n\nA=1\nB = x=y \nNCCL_DEBUG=WARN\n")
    (tmp_path / ".deepspeed_env").write_text("export A=2\n")
    environ = {"NCCL_DEBUG": "INFO", "PYTHONPATH": "/p", "MLFLOW_X": "m", "UCX_TLS": "tcp", "MV2_Y": "v", "HOME": "/h", "NCCL bad": "no"}
    assert exports.exported(environ) == {"NCCL_DEBUG": "WARN", "PYTHONPATH": "/p", "MLFLOW_X": "m", "UCX_TLS": "tcp", "MV2_Y": "v",
                                         "A": "2", "B": "x=y"}
    (tmp_path / ".deepspeed_env").write_text("A=1\nnonsense\n")
    with pytest.raises(ValueError, match=r"\.deepspeed_env line 2: expected KEY=VALUE, found 'nonsense'"):
        exports.exported({})


def test_names_of_mpi_variables():
    for name in ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK", "MPI_LOCALRANKID", "SLURM_PROCID", "HYDI_CONTROL_FD"):
        assert exports.MPI_VARIABLES.fullmatch(name), name
    for name in ("RANK", "SLURM_JOB_ID", "MPICH_GPU", "MV2_USE_CUDA", "OMP_NUM_THREADS"):
        assert not exports.MPI_VARIABLES.fullmatch(name), name


def test_ds_ssh_runs_pdsh_on_the_hosts_of_the_file(tmp_path, monkeypatch):
    from deepspeed.launcher import ds_ssh
    (tmp_path / "hosts").write_text("one slots=1\ntwo slots=1\n")
    monkeypatch.setattr(os, "execvpe", lambda *call: (_ for _ in ()).throw(SystemExit(call[1])))
    with pytest.raises(SystemExit) as call:
        ds_ssh.main(["-f", str(tmp_path / "hosts"), "df", "-h", "/tmp"])
    assert call.value.code == ["pdsh", "-S", "-w", "one,two", "df -h /tmp"]
    with pytest.raises(SystemExit, match="there is no hostfile /nowhere"):
        ds_ssh.main(["-f", "/nowhere", "ls"])
