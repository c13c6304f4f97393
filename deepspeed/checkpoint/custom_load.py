# SPDX-License-Identifier: Apache-2.0
"""Weights put into the module by a function of the caller's."""
import torch

from deepspeed.zero import GatheredParameters
from deepspeed.zero.split_master import follow
from deepspeed.zero.tensors import in_memory_order


def module_state(source):
    """The checkpoint's weights and buffers as one state dict, under all their names."""
    state = {}
    for (name, kind), info in source.tensors.items():
        if kind in ("weight", "buffer") or (kind == "fp32" and name not in state):
            state[name] = source.read(name, kind)
    state.update((alias, state[name]) for alias, name in source.aliases.items() if name in state)
    return state


def load_by(function, loading):
    """Collective. function(src=state dict, dst=module) on rank 0's whole module, and on every rank where parameters are replicated.

    The checkpoint's values are in place already; where the function leaves them, fp32 masters keep the digits that the module's
    parameters do not show.
    """
    holdings = loading.holdings
    managed, module = holdings.managed, holdings.module
    sharded = managed is not None and managed.shards_params
    with GatheredParameters(list(module.parameters())):
        before = {} if sharded else {number: held.low.clone() for number, held in enumerate(holdings.slices) if held.is_split}
        if not sharded or holdings.group_rank == 0:
            with torch.no_grad():
                function(src=module_state(loading.source), dst=module)
        if managed is None:
            return
        if sharded:
            for unit in range(managed.store.units):
                managed.store.broadcast_full(unit, 0)
        _follow(holdings, sharded, before)
    holdings.take_over_masters()


@torch.no_grad()
def _follow(holdings, sharded, before):
    """Masters and shards take over what now stands in the whole parameters. before: {slice number: weights of split masters that the whole
    parameters' memory held until now}."""
    for name, number, segment, first in holdings.segments():
        parameter = holdings.names.parameters[name]
        held = holdings.slices[number]
        values = in_memory_order(parameter.detach(), parameter)[first:first + segment.numel]
        master = held.master.narrow(0, segment.begin, segment.numel)
        if held.low is None:
            master.copy_(values)
        else:
            follow(master, values, before[number].narrow(0, segment.begin, segment.numel) if number in before else None)
    if sharded:
        for name, parameter in holdings.names.parameters.items():
            if name not in holdings.trained and parameter.numel():
                _, first, _, numel = holdings.managed.place(parameter)
                mine = in_memory_order(parameter.detach(), parameter)[first:first + numel]
                holdings.managed.local_slice(parameter).copy_(mine)
