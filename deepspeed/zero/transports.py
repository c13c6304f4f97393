# SPDX-License-Identifier: Apache-2.0
"""The groups of ranks a model is cut over, as transports."""
import struct
from typing import NamedTuple

import torch.distributed as dist

from deepspeed import _environment
from deepspeed._native import lib
from deepspeed.comm import flight, watch


class Transports(NamedTuple):
    world: object
    shard: object
    reduce: object
    replicate: object   # None: one replica


def _open(group, device, purpose):
    choice = _environment.read("DS_TRANSPORT")
    transport = lib().make_transport(group.group_name, str(device), choice, timeout_s=watch.settings().wait_limit_s)
    flight.name_transport(transport, purpose, dist.get_process_group_ranks(group))
    return transport


def open_transports(device, group=None, shard_size=None):
    """Collective. `shard_size` < world: hybrid sharding, cut over blocks of that many consecutive ranks, replicated across them."""
    group = group if group is not None else dist.group.WORLD
    ranks = dist.get_process_group_ranks(group)
    if shard_size is None or shard_size <= 1 or shard_size >= len(ranks):
        world = _open(group, device, "data-parallel group")
        return Transports(world, world, _second(world, ranks, device), None)
    if len(ranks) % shard_size:
        raise ValueError(f"zero_optimization.zero_hpz_partition_size: {shard_size} does not divide the {len(ranks)} data-parallel ranks")
    place = ranks.index(dist.get_rank())
    block = place // shard_size * shard_size
    shard_ranks = ranks[block:block + shard_size]
    world = _open(group, device, "data-parallel group")
    shard = _open(_new_group(shard_ranks, world), device, "shard group")
    replicate = _open(_new_group(ranks[place % shard_size::shard_size], world), device, "replicate group")
    return Transports(world, shard, _second(shard, shard_ranks, device), replicate)


def _agree_on_names(parent):
    """torch names a group that only its members make by its ranks and by how many groups the process has, and members whose names
    differ wait for each other for ever. Those that have fewer groups than others catch up with groups of their own."""
    names = dist.distributed_c10d._world.pg_names
    found = parent.all_gather_host(struct.pack("q", len(names)), "group_names")
    for _ in range(max(struct.unpack("q", item)[0] for item in found) - len(names)):
        dist.new_group([dist.get_rank()], backend="gloo", use_local_synchronization=True)


def _backend_needs_all_ranks():
    return dist.get_backend() == "mpi" or dist.group.WORLD.bound_device_id is not None


def _new_group(ranks, parent):
    """A new group of these ranks. Collective over `parent`, the transport of a group that holds them; each of its ranks makes a group.
    Other ranks may be making other groups meanwhile, or none.

    Where the backend makes groups with the help of all ranks (MPI; NCCL bound to a device, which splits its communicator), all
    ranks must call this, and make all groups that are asked for in one order.
    """
    if not _backend_needs_all_ranks():
        _agree_on_names(parent)
        return dist.new_group(ranks, use_local_synchronization=True)
    asked = [None] * dist.get_world_size()
    dist.all_gather_object(asked, tuple(ranks))
    made = {members: dist.new_group(list(members)) for members in sorted(set(asked))}
    return made[tuple(ranks)]


def _second(transport, ranks, device):
    """Reductions need an order of their own where the carrier demands one for all collectives of a group."""
    if not transport.needs_matching_order or transport.size == 1:
        return transport
    return _open(_new_group(ranks, transport), device, "reduction group")
