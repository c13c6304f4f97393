# SPDX-License-Identifier: Apache-2.0
"""From the command line to a job: which hosts and slots it gets, and what is refused."""

from __future__ import annotations

import argparse
from collections.abc import Sized

from . import devices
from .launch import Elastic, Job, LaunchError, job_from_args
from .options import DEFAULT_HOSTFILE
from .resources import fetch_hostfile, parse_resource_filter
from .say import Voice

LOCALHOST = "localhost"


def _refuse_contradictions(args: argparse.Namespace) -> None:
    if args.autotuning:
        raise LaunchError("--autotuning: the autotuner is not built yet")
    if args.num_gpus != -1 and (args.include or args.exclude):
        raise LaunchError("--num_gpus: not together with --include or --exclude, which say it already")
    if args.include and args.exclude:
        raise LaunchError("--include and --exclude exclude each other; give one of them")
    if args.no_ssh and args.force_multi:
        raise LaunchError("--force_multi: starts the hosts over the network, and --no_ssh forbids it")
    if not args.elastic_training and (args.min_elastic_nodes != -1 or args.max_elastic_nodes != -1):
        raise LaunchError("--min_elastic_nodes, --max_elastic_nodes: only with --elastic_training")


def _elastic(args: argparse.Namespace, hosts: int) -> Elastic | None:
    if not args.elastic_training:
        return None
    least = 1 if args.min_elastic_nodes == -1 else args.min_elastic_nodes
    most = hosts if args.max_elastic_nodes == -1 else args.max_elastic_nodes
    if not 1 <= least <= hosts <= most:
        raise LaunchError(f"--min_elastic_nodes {least}, --max_elastic_nodes {most}: the job begins with {hosts} "
                          f"host{'s' if hosts > 1 else ''}, which must lie between them")
    return Elastic(least, most, args.max_restarts)


def _from_hostfile(args: argparse.Namespace, pool: dict[str, int]) -> dict[str, list]:
    world = parse_resource_filter(pool, args.include, args.exclude)
    if not world:
        raise LaunchError("no slots are left after --exclude")
    if args.num_nodes != -1:
        if args.num_nodes > len(world):
            raise LaunchError(f"--num_nodes {args.num_nodes}: {args.hostfile} offers {len(world)} hosts")
        world = dict(list(world.items())[:args.num_nodes])
    if args.num_gpus != -1:
        for host, slots in world.items():
            if args.num_gpus > len(slots):
                raise LaunchError(f"--num_gpus {args.num_gpus}: host {host} has {len(slots)} slots")
        world = {host: slots[:args.num_gpus] for host, slots in world.items()}
    return world


def _local_slots(args: argparse.Namespace, gpus: int, say: Voice) -> list:
    """The slots of this host: GPU numbers (or UUIDs), or on a machine without GPU just numbers."""
    filtered = bool(args.include or args.exclude)
    if not gpus:
        if filtered:
            slots = max(devices.usable_cores(), 1)
            return parse_resource_filter({LOCALHOST: slots}, args.include, args.exclude).get(LOCALHOST, [])
        if args.num_gpus == -1:
            say("info", "no GPU found: starting 1 process on the CPU (--num_gpus N starts N)")
        return list(range(max(1, args.num_gpus)))
    slots: list = list(range(gpus))
    visible = devices.visible_devices()
    if visible is not None and filtered:
        say("warning", "CUDA_VISIBLE_DEVICES is ignored because --include or --exclude is given")
    elif visible is not None:
        slots = [int(item) if item.isdigit() else item for item in visible]
    if filtered:
        return parse_resource_filter({LOCALHOST: slots}, args.include, args.exclude).get(LOCALHOST, [])
    if args.num_gpus > len(slots):
        raise LaunchError(f"--num_gpus {args.num_gpus}: this host has {len(slots)} usable GPUs "
                          "(DS_ACCELERATOR=cpu runs that many processes on the CPU)")
    return slots[:args.num_gpus] if args.num_gpus != -1 else slots


def _use_gpus(say: Voice) -> int:
    """Number of GPUs to offer; a user who hides all of them wants the CPU."""
    gpus = devices.gpu_count()
    if gpus and devices.visible_devices() == []:
        say("info", "CUDA_VISIBLE_DEVICES is empty: using the CPU")
        return 0
    return gpus


def plan_job(args: argparse.Namespace, say: Voice) -> Job:
    """From the command line to the job. ``LaunchError`` or ``ValueError`` when it makes no sense."""
    _refuse_contradictions(args)
    pool = fetch_hostfile(args.hostfile)
    if pool is None and args.num_nodes > 1:
        raise LaunchError(f"--num_nodes {args.num_nodes}: there is no hostfile {args.hostfile}")
    if pool is None and args.hostfile not in (DEFAULT_HOSTFILE, ""):
        say("warning", f"--hostfile {args.hostfile}: no such file; the job runs on this host alone")
    gpus = _use_gpus(say)
    world = {LOCALHOST: _local_slots(args, gpus, say)} if pool is None else _from_hostfile(args, pool)
    if not any(world.values()):
        raise LaunchError("no slots are left to run on")
    if args.node_rank not in ((-1, ) if len(world) > 1 else (-1, 0)) and not args.no_ssh:
        raise LaunchError(f"--node_rank {args.node_rank}: only with --no_ssh, when this command is started on every host by hand")
    by_hand = args.no_ssh and len(world) > 1
    if by_hand and args.node_rank == -1:
        raise LaunchError("--no_ssh: say with --node_rank which of the hosts this is")
    # Hosts that are started from here agree on an address when they have called back.
    master = args.master_addr or (next(iter(world)) if by_hand else "" if starts_hosts(args, world) else "127.0.0.1")
    return job_from_args(args,
                         world_info=world,
                         master_addr=master,
                         use_gpus=gpus > 0,
                         elastic=_elastic(args, len(world)),
                         script=args.user_script,
                         script_args=args.user_args)


def starts_hosts(args: argparse.Namespace, world: Sized) -> bool:
    """Whether the job is started over the network, not as processes of this launcher."""
    return not args.no_ssh and (len(world) > 1 or args.force_multi)
