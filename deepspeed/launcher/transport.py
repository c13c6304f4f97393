# SPDX-License-Identifier: Apache-2.0
"""What starts a launcher on each host: the command lines of pdsh, ssh, MPI and Slurm, and the environment that goes along.

Every one of them runs the same shell command on each host. Ranks are children of that host's launcher, whatever started
it, so that logs, cores, signals and failures work alike.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .exports import exported
from .say import Voice

SSH_OPTIONS = ["-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=3"]

class NoTransport(Exception):
    """The program that should start the job on other hosts is not there."""


@dataclass(frozen=True)
class Transport:
    """One process to start on this host; ``node_ranks`` are the hosts that it starts launchers on."""
    name: str
    argv: list[str]
    node_ranks: list[int]
    env: dict[str, str]
    may_queue: bool = False  # it may wait for hosts to become free


def remote_command(arguments: Sequence[str], env: Mapping[str, str]) -> str:
    """A shell command that runs the launcher of a host in this directory, for whatever login shell reads it."""
    command = ["env", *(f"{name}={value}" for name, value in env.items()), sys.executable, "-u", "-m",
               "deepspeed.launcher.launch", *arguments]
    return shlex.join(["/bin/sh", "-c", f"cd {shlex.quote(os.getcwd())} && exec {shlex.join(command)}"])


def transports(launcher: str, hosts: Sequence[str], arguments: Sequence[str], launcher_args: str, ssh_port: int | None,
               say: Voice) -> list[Transport]:
    """What to start. ``arguments`` go to ``deepspeed.launcher.launch`` on each host."""
    extra = shlex.split(launcher_args)
    env = exported(os.environ)
    if launcher == "pdsh" and shutil.which("pdsh") is None:
        say("warning", "pdsh is not installed (apt-get install pdsh): using plain ssh")
        launcher = "ssh"
    if launcher in ("pdsh", "ssh"):
        start = _pdsh if launcher == "pdsh" else _ssh
        return [start(host, rank, remote_command([f"--node_rank={rank}", *arguments], env), extra, ssh_port)
                for rank, host in enumerate(hosts)]
    everywhere = shlex.split(remote_command(arguments, env))
    own_env = dict(os.environ)
    if launcher == "slurm":
        argv = [_program("srun"), f"--nodes={len(hosts)}", f"--ntasks={len(hosts)}", "--ntasks-per-node=1",
                f"--nodelist={','.join(hosts)}", "--cpu-bind=none", "--kill-on-bad-exit=0", "--input=none", "--export=ALL"]
    elif launcher == "openmpi":
        argv = [_program("mpirun.openmpi", "mpirun"), "-n", str(len(hosts)), "--host", ",".join(f"{host}:1" for host in hosts),
                "--map-by", "ppr:1:node", "--bind-to", "none"]
        argv += ["--allow-run-as-root"] if os.geteuid() == 0 else []
        argv += ["--mca", "plm_rsh_args", f"-p {ssh_port}"] if ssh_port else []
    else:  # MPICH and what is made from it
        argv = [_program("mpiexec.mpich", "mpiexec.hydra", "mpirun", "mpiexec") if launcher == "mpich" else
                _program("mpiexec.hydra", "mpirun", "mpiexec"), "-n", str(len(hosts)), "-ppn", "1", "-hosts", ",".join(hosts)]
        if ssh_port:
            own_env["HYDRA_LAUNCHER_EXTRA_ARGS"] = f"-p {ssh_port}"
    return [Transport(os.path.basename(argv[0]), argv + extra + everywhere, list(range(len(hosts))), own_env, launcher == "slurm")]


def _program(*names: str) -> str:
    for name in names:
        path = shutil.which(name)
        if path is not None:
            return path
    raise NoTransport(f"{names[-1]} is not installed or not in PATH; --launcher ssh needs only ssh")


def _ssh(host: str, node_rank: int, command: str, extra: list[str], port: int | None) -> Transport:
    argv = [_program("ssh"), *SSH_OPTIONS, *(["-p", str(port)] if port else []), *extra, host, command]
    return Transport("ssh", argv, [node_rank], dict(os.environ))


def _pdsh(host: str, node_rank: int, command: str, extra: list[str], port: int | None) -> Transport:
    """One pdsh per host: its exit then says which host it was."""
    return Transport("pdsh", [_program("pdsh"), "-S", *extra, "-w", host, command], [node_rank], pdsh_environment(port))


def pdsh_environment(port: int | None) -> dict[str, str]:
    env = dict(os.environ)
    env.setdefault("PDSH_RCMD_TYPE", "ssh")
    options = [env.get("PDSH_SSH_ARGS_APPEND", ""), *SSH_OPTIONS, *(["-p", str(port)] if port else [])]
    env["PDSH_SSH_ARGS_APPEND"] = " ".join(filter(None, options))
    return env
