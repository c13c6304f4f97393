# SPDX-License-Identifier: Apache-2.0
"""The groups of ranks a model is cut over, as transports."""
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
    me = dist.get_rank()
    blocks = [ranks[i:i + shard_size] for i in range(0, len(ranks), shard_size)]
    strides = [ranks[i::shard_size] for i in range(shard_size)]
    world = _open(group, device, "data-parallel group")
    shard_ranks, shard = _mine(blocks, me, device, "shard group")
    _, replicate = _mine(strides, me, device, "replicate group")
    return Transports(world, shard, _second(shard, shard_ranks, device, blocks), replicate)


def _mine(partitions, me, device, purpose):
    """Every rank takes part in making all groups; its own one is opened."""
    found = None
    for ranks in partitions:
        group = dist.new_group(ranks)
        if me in ranks:
            found = (ranks, group)
    return found[0], _open(found[1], device, purpose)


def _second(transport, ranks, device, partitions=None):
    """Reductions need an order of their own where the carrier demands one for all collectives of a group."""
    if not transport.needs_matching_order or transport.size == 1:
        return transport
    return _mine(partitions or [ranks], dist.get_rank(), device, "reduction group")[1]
