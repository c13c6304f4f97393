# SPDX-License-Identifier: Apache-2.0
"""The ranks of one host: command, environment and cores of each, then the supervisor.

``deepspeed`` calls :func:`launch` in its own process. ``python -m deepspeed.launcher.launch`` is the same for whoever
starts each host by other means.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import sys
import time
from dataclasses import dataclass, field

from . import devices
from .line import Line, Lost
from .options import DEFAULT_MASTER_PORT
from .port import reserve_port
from .processes import RankSpec
from .resources import decode_world_info, encode_world_info
from .say import LEVELS, Voice
from .supervisor import StartError, Supervisor

PID_FILE_BASEPATH = "/tmp"


class LaunchError(Exception):
    """The job cannot be started as asked; the message says why and what to do."""


@dataclass(frozen=True)
class Elastic:
    """An elastic job: how many hosts it may have, and how often it is restarted."""
    min_hosts: int
    max_hosts: int
    max_restarts: int


@dataclass
class Job:
    """What to run, and this host's part of it. ``world_info`` maps each host to its slots, in rank order."""
    world_info: dict[str, list]
    script: str
    script_args: list[str] = field(default_factory=list)
    node_rank: int = 0
    master_addr: str = "127.0.0.1"
    master_port: int = DEFAULT_MASTER_PORT
    use_gpus: bool = False  # the slots are GPUs: make each host's visible to its ranks
    module: bool = False
    no_python: bool = False
    no_local_rank: bool = False
    bind_cores: bool = False
    bind_core_list: str | None = None
    venv_script: str | None = None
    log_dir: str | None = None
    save_pid: bool = False
    elastic: Elastic | None = None

    @property
    def slots(self) -> list:
        return list(self.world_info.values())[self.node_rank]

    @property
    def world_size(self) -> int:
        return sum(len(slots) for slots in self.world_info.values())

    @property
    def first_rank(self) -> int:
        return sum(len(slots) for slots in list(self.world_info.values())[:self.node_rank])


def _command(job: Job, local_rank: int | str) -> list[str]:
    argv = []
    if job.venv_script is not None:
        argv += ["/bin/bash", "-c", '. "$0" && exec "$@"', job.venv_script]
    if not job.no_python:
        # The interpreter that runs the launcher, unless a virtual environment is to bring its own.
        argv += ["python" if job.venv_script is not None else sys.executable, "-u"]
        argv += ["-m"] if job.module else []
    argv += [job.script]
    argv += [] if job.no_local_rank else [f"--local_rank={local_rank}"]
    return argv + job.script_args


def _environment(job: Job, local_rank: int, threads: int) -> dict[str, str]:
    env = dict(os.environ)
    env.update(RANK=str(job.first_rank + local_rank),
               LOCAL_RANK=str(local_rank),
               WORLD_SIZE=str(job.world_size),
               LOCAL_SIZE=str(len(job.slots)),
               CROSS_RANK=str(job.node_rank),
               CROSS_SIZE=str(len(job.world_info)),
               MASTER_ADDR=job.master_addr,
               MASTER_PORT=str(job.master_port))
    if job.use_gpus:
        env["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, job.slots))
    if job.bind_cores:
        env["OMP_NUM_THREADS"] = str(threads)  # more than the rank has cores would only wait for each other
    else:
        env.setdefault("OMP_NUM_THREADS", str(threads))
    if "COLUMNS" not in env and sys.stderr is not None and sys.stderr.isatty():
        # The ranks' stderr is a pipe to the launcher; tell progress bars how wide the terminal behind it is.
        env["COLUMNS"] = str(os.get_terminal_size(sys.stderr.fileno()).columns)
    return env


def _shares(job: Job) -> list[tuple[frozenset[int] | None, int]]:
    """Cores and threads of each rank."""
    ranks = len(job.slots)
    if job.bind_cores:
        nodes = [devices.gpu_node(slot) for slot in job.slots] if job.use_gpus else None
        try:
            return [(frozenset(cpus), threads) for cpus, threads in devices.share_cores(ranks, job.bind_core_list, nodes)]
        except ValueError as error:
            raise LaunchError(str(error)) from None
    return [(None, max(1, devices.usable_cores() // ranks))] * ranks


def rank_specs(job: Job) -> list[RankSpec]:
    """What to start for each rank of this host. ``LaunchError`` when that cannot work."""
    if not 0 <= job.node_rank < len(job.world_info):
        raise LaunchError(f"--node_rank {job.node_rank}: there are {len(job.world_info)} hosts, numbered from 0")
    if not job.module and not job.no_python and not os.path.exists(job.script):
        raise LaunchError(f"{job.script}: no such file (to run a module, say --module; a program, --no_python)")
    if job.venv_script is not None and not os.path.isfile(job.venv_script):
        raise LaunchError(f"--venv_script {job.venv_script}: no such file")
    if job.log_dir is not None:
        _make_log_dir(job.log_dir)
    if job.elastic is not None:
        return [_elastic_agent(job, job.elastic)]
    started = time.strftime("%Y%m%d%H%M%S")
    specs = []
    for local_rank, (cpus, threads) in enumerate(_shares(job)):
        rank = job.first_rank + local_rank
        log = None if job.log_dir is None else os.path.join(job.log_dir, f"{started}_rank{rank}.log")
        specs.append(RankSpec(rank, _command(job, local_rank), _environment(job, local_rank, threads), cpus, log))
    return specs


def _make_log_dir(path: str) -> None:
    try:
        os.makedirs(path, exist_ok=True)
        if not os.access(path, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise LaunchError(f"--enable_each_rank_log {path}: cannot be written to: {error.strerror}") from None


def _elastic_agent(job: Job, elastic: Elastic) -> RankSpec:
    """The one process that keeps this host's ranks when they may be restarted."""
    if job.bind_cores:
        raise LaunchError("--bind_cores_to_rank: not with --elastic_training, where the number of ranks changes")
    argv = [sys.executable, "-u", "-m", "deepspeed.launcher.elastic", f"--ranks={len(job.slots)}",
            f"--hosts={elastic.min_hosts}:{elastic.max_hosts}", f"--max_restarts={elastic.max_restarts}",
            f"--meet={job.master_addr}:{job.master_port}", f"--node_rank={job.node_rank}", *_flag("log_dir", job.log_dir)]
    env = _environment(job, 0, max(1, devices.usable_cores() // len(job.slots)))
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "CROSS_RANK", "CROSS_SIZE"):
        del env[name]  # the agent says what holds now
    return RankSpec(job.first_rank, [*argv, "--", *_command(job, "${local_rank}")], env, label="the elastic agent")


def _flag(name: str, value) -> list[str]:
    """A value as the flag of a command line; nothing for False and None."""
    if value is None or value is False:
        return []
    return [f"--{name}"] if value is True else [f"--{name}={value}"]


def arguments_of(job: Job, contact: str, log_level: str) -> list[str]:
    """The command line of this module that runs a host's part of the job; ``--node_rank`` is left to the caller."""
    elastic = None if job.elastic is None else f"{job.elastic.min_hosts}:{job.elastic.max_hosts}:{job.elastic.max_restarts}"
    flags = {"world_info": encode_world_info(job.world_info), "head": contact, "master_port": job.master_port, "module": job.module,
             "no_python": job.no_python, "no_local_rank": job.no_local_rank, "bind_cores_to_rank": job.bind_cores,
             "bind_core_list": job.bind_core_list, "venv_script": job.venv_script, "enable_each_rank_log": job.log_dir,
             "elastic": elastic, "log_level": log_level}
    return [text for name, value in flags.items() for text in _flag(name, value)] + [job.script, *job.script_args]


def launch(job: Job, say: Voice, line: Line | None = None) -> int:
    """Run this host's ranks to their end; returns the exit code of the job. With a ``line`` the meeting port is agreed on."""
    reserved = None
    if job.node_rank == 0 and line is None:
        reserved = _meeting_port(job, say)
    try:
        specs = rank_specs(job)
        say("debug", f"{job.world_size} ranks on {len(job.world_info)} hosts, {len(specs)} here; "
            f"they meet at {job.master_addr}:{job.master_port}")
        with pid_file(job.save_pid):
            return Supervisor(specs, say, line=line).run()
    except StartError as error:
        if line is not None:
            raise
        say("error", str(error))
        return error.code
    finally:
        if reserved is not None:
            reserved.close()


@contextlib.contextmanager
def pid_file(wanted: bool):
    """This launcher's process id in /tmp/<pid>.deepspeed while it runs."""
    path = os.path.join(PID_FILE_BASEPATH, f"{os.getpid()}.deepspeed")
    if wanted:
        try:
            with open(path, "w", encoding="utf-8") as file:
                file.write(str(os.getpid()))
        except OSError as error:
            raise LaunchError(f"--save_pid: {path} cannot be written: {error.strerror}") from None
    try:
        yield
    finally:
        if wanted:
            os.unlink(path)


def _meeting_port(job: Job, say: Voice):
    """Reserve the port (see Note [Port reservation]); only a single host can agree with itself on another one."""
    wanted = job.master_port
    reserved = reserve_port(wanted)
    if reserved.port == wanted:
        return reserved
    if len(job.world_info) > 1:
        reserved.close()
        raise LaunchError(f"--master_port {wanted}: in use on this host, and with --no_ssh the others cannot be told; "
                          "give another one to all hosts")
    if wanted:
        say("warning", f"port {wanted} is in use; the processes meet on port {reserved.port} instead")
    job.master_port = reserved.port
    return reserved


def parse_args(args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="deepspeed.launcher.launch", description="Start the ranks of this host.")
    add = parser.add_argument
    add("--world_info", required=True, help="text of encode_world_info: {host: [slots]}")
    add("--node_rank", type=int, default=None, help="number of this host (default: 0; with --head it finds out)")
    add("--master_addr", default="127.0.0.1", help="address of the first host")
    add("--master_port", type=int, default=DEFAULT_MASTER_PORT, help="port on it")
    add("--module", action="store_true")
    add("--no_python", action="store_true")
    add("--no_local_rank", action="store_true")
    add("--save_pid", action="store_true")
    add("--enable_each_rank_log", default="None", metavar="DIR")
    add("--bind_cores_to_rank", action="store_true")
    add("--bind_core_list", default=None, metavar="LIST")
    add("--venv_script", default=None, metavar="FILE")
    add("--head", default=None, metavar="CONTACT", help="where the launching host listens; it sets what is not given")
    add("--elastic", default=None, metavar="MIN:MAX:RESTARTS")
    add("--log_level", default="info", choices=list(LEVELS))
    add("training_script")
    add("training_script_args", nargs=argparse.REMAINDER).required = False
    return parser.parse_args(args)


def job_from_args(args: argparse.Namespace, **fields) -> Job:
    """The part of a job that both command lines spell alike; ``fields`` are the rest."""
    return Job(node_rank=max(0, args.node_rank or 0),
               master_port=args.master_port,
               module=args.module,
               no_python=args.no_python,
               no_local_rank=args.no_local_rank,
               bind_cores=args.bind_cores_to_rank or args.bind_core_list is not None,
               bind_core_list=args.bind_core_list,
               venv_script=args.venv_script,
               log_dir=None if args.enable_each_rank_log in ("None", "") else args.enable_each_rank_log,
               save_pid=args.save_pid,
               **fields)


def main(args: list[str] | None = None) -> None:
    parsed = parse_args(args)
    say = Voice(parsed.log_level)
    try:
        job = job_from_args(parsed,
                            world_info=decode_world_info(parsed.world_info),
                            master_addr=parsed.master_addr,
                            use_gpus=devices.gpu_count() > 0,
                            elastic=None if parsed.elastic is None else Elastic(*map(int, parsed.elastic.split(":"))),
                            script=parsed.training_script,
                            script_args=parsed.training_script_args)
        code = launch(job, say) if parsed.head is None else _launch_for_head(job, parsed, say)
    except (LaunchError, Lost, OSError, ValueError) as error:
        say("critical", f"error: {error}")
        code = 1
    sys.exit(code)


def _launch_for_head(job: Job, parsed: argparse.Namespace, say: Voice) -> int:
    """This host's part of a job that another host has started and reports on."""
    from . import member
    from .exports import MPI_VARIABLES
    membership = member.join(parsed.head, -1 if parsed.node_rank is None else parsed.node_rank, job.master_port)
    job.node_rank, job.master_addr, job.master_port = membership.node_rank, membership.master_addr, membership.master_port
    for name in [name for name in os.environ if MPI_VARIABLES.fullmatch(name)]:
        del os.environ[name]
    try:
        launch(job, say, membership.line)
    except (LaunchError, StartError) as error:
        member.refuse(membership.line, str(error))
    finally:
        if membership.reserved is not None:
            membership.reserved.close()
    # The launching host has the job's code. Another one than 0 here would make mpirun and srun kill the other hosts.
    return 0


if __name__ == "__main__":
    main()
