# SPDX-License-Identifier: Apache-2.0
"""The ranks of one host: command, environment and cores of each, then the supervisor.

``deepspeed`` calls :func:`launch` in its own process. ``python -m deepspeed.launcher.launch`` is the same for whoever
starts each host by other means.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import dataclass, field

from . import devices
from .options import DEFAULT_MASTER_PORT
from .port import reserve_port
from .processes import RankSpec
from .resources import decode_world_info
from .say import LEVELS, Voice
from .supervisor import StartError, Supervisor

PID_FILE_BASEPATH = "/tmp"


class LaunchError(Exception):
    """The job cannot be started as asked; the message says why and what to do."""


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

    @property
    def slots(self) -> list:
        return list(self.world_info.values())[self.node_rank]

    @property
    def world_size(self) -> int:
        return sum(len(slots) for slots in self.world_info.values())

    @property
    def first_rank(self) -> int:
        return sum(len(slots) for slots in list(self.world_info.values())[:self.node_rank])


def _command(job: Job, local_rank: int) -> list[str]:
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
        try:
            return [(frozenset(cpus), threads) for cpus, threads in devices.share_cores(ranks, job.bind_core_list)]
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
        os.makedirs(job.log_dir, exist_ok=True)
    started = time.strftime("%Y%m%d%H%M%S")
    specs = []
    for local_rank, (cpus, threads) in enumerate(_shares(job)):
        rank = job.first_rank + local_rank
        log = None if job.log_dir is None else os.path.join(job.log_dir, f"{started}_rank{rank}.log")
        specs.append(RankSpec(rank, _command(job, local_rank), _environment(job, local_rank, threads), cpus, log))
    return specs


def launch(job: Job, say: Voice) -> int:
    """Run this host's ranks to their end; returns the exit code of the job."""
    reserved = None
    if job.node_rank == 0:
        reserved = _meeting_port(job, say)
    pid_file = None
    try:
        specs = rank_specs(job)
        if job.save_pid:
            pid_file = os.path.join(PID_FILE_BASEPATH, f"{os.getpid()}.deepspeed")
            with open(pid_file, "w", encoding="utf-8") as file:
                file.write(str(os.getpid()))
        say("debug", f"{job.world_size} ranks on {len(job.world_info)} hosts, {len(specs)} here; "
            f"they meet at {job.master_addr}:{job.master_port}")
        return Supervisor(specs, say).run()
    except StartError as error:
        say("error", str(error))
        return error.code
    finally:
        if pid_file is not None:
            os.unlink(pid_file)
        if reserved is not None:
            reserved.close()


def _meeting_port(job: Job, say: Voice):
    """Reserve the port (see Note [Port reservation]); only a single host can agree with itself on another one."""
    wanted = job.master_port
    reserved = reserve_port(wanted)
    if reserved.port == wanted:
        return reserved
    if len(job.world_info) > 1:
        reserved.close()
        raise LaunchError(f"--master_port {wanted}: in use on this host; give another one to all hosts")
    if wanted:
        say("warning", f"port {wanted} is in use; the processes meet on port {reserved.port} instead")
    job.master_port = reserved.port
    return reserved


def parse_args(args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="deepspeed.launcher.launch", description="Start the ranks of this host.")
    add = parser.add_argument
    add("--world_info", required=True, help="text of encode_world_info: {host: [slots]}")
    add("--node_rank", type=int, default=0, help="number of this host")
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
    add("--log_level", default="info", choices=list(LEVELS))
    add("training_script")
    add("training_script_args", nargs=argparse.REMAINDER)
    return parser.parse_args(args)


def job_from_args(args: argparse.Namespace, **fields) -> Job:
    """The part of a job that both command lines spell alike; ``fields`` are the rest."""
    return Job(node_rank=max(0, args.node_rank),
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
                            script=parsed.training_script,
                            script_args=parsed.training_script_args)
        code = launch(job, say)
    except (LaunchError, ValueError) as error:
        say("critical", f"error: {error}")
        code = 1
    sys.exit(code)


if __name__ == "__main__":
    main()
