# SPDX-License-Identifier: Apache-2.0
"""Looking at, and changing, whole parameters that ZeRO-3 has sharded."""
import torch

from deepspeed.zero.managed import home_of
from deepspeed.zero.tensors import tensors_in


def _managed(params):
    """Distinct (home) entries of sharded parameters among whatever the caller passed: None, buffers, plain parameters are skipped. In the
    order in which parameters were sharded, alike on all ranks: a caller's set has another order on each."""
    if isinstance(params, torch.Tensor):
        params = [params]
    homes, seen = [], set()
    for item in params if params is not None else ():
        for parameter in tensors_in(item):
            home = home_of(parameter)
            if home is not None and home.owner.sharded_api and id(parameter) not in seen:
                seen.add(id(parameter))
                homes.append(home)
    return sorted(homes, key=lambda home: home.owner.params[home.index].ds_id)


class GatheredParameters:
    """Within the block the parameters are whole on every rank.

    params: a parameter or any iterable of them; None, plain tensors and duplicates are allowed, and without any sharded
    parameter the block does nothing. modifier_rank: the rank whose changes everyone takes over at the end (collective); None:
    changes are forgotten at the end. fwd_module: register the parameters as external ones of that module.

    Blocks nest: entering with parameters that are whole already costs nothing and needs no other rank.
    """

    def __init__(self, params, modifier_rank=None, fwd_module=None, enabled=True):
        self.modifier_rank = modifier_rank
        self.enabled = enabled
        self._homes = _managed(params) if enabled else []
        self._held = []
        if fwd_module is not None:
            from deepspeed.zero.external import register_external_parameter
            for home in self._homes:
                register_external_parameter(fwd_module, home.owner.params[home.index])

    def __enter__(self):
        units = {}
        for home in self._homes:
            units[(id(home.owner), home.unit)] = home
        for home in units.values():
            home.owner.refuse_while_away("GatheredParameters", "lp_params")
            store = home.owner.store
            self._held.append((home, store.is_gathered(home.unit)))
            if not store.is_gathered(home.unit):
                store.gather(home.unit, "gather_parameters")
            store.pin(home.unit)
        return self

    def __exit__(self, kind, error, trace):
        held, self._held = self._held, []
        for home, was_whole in reversed(held):
            if not home.alive:
                continue
            store = home.owner.store
            store.unpin(home.unit)
            if self.modifier_rank is not None and kind is None:
                store.broadcast_full(home.unit, self.modifier_rank)
                store.write_back(home.unit)
            elif not store.shards_params or was_whole:
                continue
            if not was_whole and not store.pins(home.unit):
                store.release(home.unit, True)
        return False
