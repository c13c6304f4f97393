# SPDX-License-Identifier: Apache-2.0
"""Whole weights out of an engine one after the other, for whoever serves the model meanwhile."""
import sys
from typing import NamedTuple

import torch

from deepspeed.zero.managed import home_of


class _Item(NamedTuple):
    name: str
    parameter: torch.nn.Parameter
    deltas: tuple       # ((LoRA layer, adapter), ...) to be added
    needed: tuple       # parameters that have to be whole


class WeightMethods:

    def iter_full_params(self, bucket_bytes=256 << 20, merge_lora=False):
        """Yields (name, tensor) for every parameter, whole, in the order of module.named_parameters(), each tied one once. Collective: every
        rank goes through all of it, and no other collective of the engine runs in between.

        Tensors are in the model's dtype on the engine's device, without gradients, to be read until the next item is asked for.
        bucket_bytes: what is gathered at a time, the next bucket, which is on its way already, included; where one unit of the engine is
        larger than half of it, two units.

        merge_lora: weights as PEFT's merge_and_unload() would leave them, under the names of the model below PEFT; adapters do not appear,
        and neither is the model touched. Only adapters that are active count. ValueError for adapters that are not a sum (DoRA)
        and for weights that nothing can be added to (quantised ones).
        """
        self._refuse_half_loaded()
        self._refuse_without_states("iter_full_params", "lp_params")
        if bucket_bytes <= 0:
            raise ValueError(f"iter_full_params: bucket_bytes must be positive, got {bucket_bytes}")
        items = _merged(self.module) if merge_lora else [_Item(name, p, (), (p,)) for name, p in self.module.named_parameters()]
        return _stream(items, bucket_bytes)


# ---- gathering

def _units_of(item):
    """{(id of the owner, unit): home} of the units that have to be gathered."""
    found = {}
    for parameter in item.needed:
        home = home_of(parameter)
        if home is not None and home.owner.shards_params:
            found[id(home.owner), home.unit] = home
    return found


def _unit_bytes(home):
    store = home.owner.store
    infos = [store.flat_info(flat) for flat in store.unit_flats(home.unit)]
    return sum(info["numel"] * info["dtype"].itemsize for info in infos)


def _buckets(items, limit):
    """[(items, units)]: neighbours whose units have at most `limit` bytes together, or one item."""
    buckets, held, size = [], {}, 0
    for item in items:
        units = _units_of(item)
        new = {key: home for key, home in units.items() if key not in held}
        more = sum(_unit_bytes(home) for home in new.values())
        if not buckets or (held and new and size + more > limit):
            buckets.append(([], {}))
            held, size, new = buckets[-1][1], 0, units
            more = sum(_unit_bytes(home) for home in new.values())
        buckets[-1][0].append(item)
        held.update(new)
        size += more
    return buckets


class _Held:
    """Units that this iteration keeps whole; those that were whole before stay so."""

    def __init__(self, units):
        self._homes = [home for home in units.values() if home.alive]
        self._pinned = []

    def start(self):
        """Begins the transfer of what is not there."""
        for home in self._homes:
            home.owner.refuse_while_away("iter_full_params", "lp_params")
            home.owner.store.gather(home.unit, "gather_stream", prefetch=True)

    def finish(self):
        for home in self._homes:
            home.owner.store.gather(home.unit, "gather_stream")
            home.owner.store.pin(home.unit)
            self._pinned.append(home)

    def free(self):
        pinned, self._pinned = self._pinned, []
        for home in pinned:
            if home.alive:
                store = home.owner.store
                store.unpin(home.unit)
                if not store.pins(home.unit):
                    store.release(home.unit, True)   # who kept a tensor keeps its values


def _stream(items, bucket_bytes):
    buckets = _buckets(items, bucket_bytes // 2)
    ahead = None
    try:
        for number, (members, units) in enumerate(buckets):
            now, ahead = ahead or _Held(units), None
            try:
                now.start()
                now.finish()
                if number + 1 < len(buckets):
                    following = buckets[number + 1][1]
                    ahead = _Held(following)
                    ahead.start()
                for item in members:
                    yield item.name, _value(item)
            finally:
                now.free()
    finally:
        if ahead is not None:   # the caller has stopped in between
            ahead.finish()
            ahead.free()


@torch.no_grad()
def _value(item):
    if not item.deltas:
        return item.parameter.detach()
    total = item.parameter.detach().float()
    for layer, adapter in item.deltas:
        delta = layer.get_delta_weight(adapter)
        if delta.shape != total.shape:   # of a layer whose factors do not tell it beforehand
            raise _unfit(item.name, item.parameter, delta.shape)
        total = total + delta.float()
    return total.to(item.parameter.dtype)


# ---- LoRA

def _unfit(name, weight, wanted):
    return ValueError(f"iter_full_params: merge_lora adds {tuple(wanted)} to the weight of '{name}', which is {tuple(weight.shape)} {weight.dtype}: "
                      "dequantise the model first, or stream it with merge_lora=False")


def _delta_shape(layer, adapter):
    """That of get_delta_weight(), told from the factors, which need not be whole for it."""
    if adapter in layer.lora_embedding_A:
        return layer.lora_embedding_A[adapter].shape[1], layer.lora_embedding_B[adapter].shape[0]
    shape = (layer.lora_B[adapter].weight.shape[0], *layer.lora_A[adapter].weight.shape[1:])
    return shape[::-1] if getattr(layer, "fan_in_fan_out", False) else shape


def _merged(module):
    """Items under the names that the model has without its adapters."""
    lora = sys.modules.get("peft.tuners.lora.layer")
    if lora is None:
        return [_Item(name, p, (), (p,)) for name, p in module.named_parameters()]
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper
    names = _Names(module, lora.LoraLayer, BaseTunerLayer, AuxiliaryTrainingWrapper)
    items = []
    for path, parameter in module.named_parameters():
        name = names.without_adapters(path)
        if name is None:
            continue
        deltas = names.deltas.get(id(parameter), ())
        factors = [p for layer, adapter in deltas for key, p in layer.named_parameters() if f".{adapter}" in key and "base_layer" not in key]
        items.append(_Item(name, parameter, tuple(deltas), (parameter, *factors)))
    return items


class _Names:
    def __init__(self, module, lora_layer, any_layer, wrapper):
        self.deltas = {}       # id of a weight -> [(layer, adapter)]
        self._layers, self._wrappers = [], []     # paths, innermost last
        self._prefix = ""
        for path, inner in module.named_modules():
            if isinstance(inner, any_layer):
                self._layers.append(path)
                self._note(path, inner, lora_layer)
            elif isinstance(inner, wrapper):
                self._wrappers.append((path, inner))
        base = getattr(module, "base_model", None)
        if type(module).__module__.startswith("peft.") and base is not None:
            self._prefix = "base_model.model." if hasattr(base, "model") and type(base).__module__.startswith("peft.") else "base_model."

    def _note(self, path, layer, lora_layer):
        if layer.disable_adapters or not layer.active_adapters:
            return
        if not isinstance(layer, lora_layer):
            raise ValueError(f"iter_full_params: '{path}' is a {type(layer).__name__}, which is no LoRA layer, and cannot be merged here")
        name = getattr(layer, "parameter_name", "weight")
        weight = getattr(layer.get_base_layer(), name)
        for adapter in layer.active_adapters:
            if adapter not in (*layer.lora_A, *layer.lora_embedding_A) or adapter in layer.merged_adapters:
                continue
            if layer.lora_variant.get(adapter) is not None or layer.lora_bias.get(adapter):
                raise ValueError(f"iter_full_params: adapter '{adapter}' of '{path}' changes more than a sum (DoRA, a bias): merge it with PEFT")
            self._refuse_quantised(path, layer, adapter, weight)
            self.deltas.setdefault(id(weight), []).append((layer, adapter))

    @staticmethod
    def _refuse_quantised(path, layer, adapter, weight):
        """Codes look like a weight: packed ones of another shape, those of one byte of the same."""
        experts = hasattr(layer, "parameter_name")   # in one tensor, whose factors lie otherwise: compared when they are merged
        wanted = tuple(weight.shape) if experts else _delta_shape(layer, adapter)
        if tuple(weight.shape) != wanted or not weight.is_floating_point() or weight.element_size() < 2:
            raise _unfit(path, weight, wanted)

    def without_adapters(self, path):
        """The name of a parameter in the model below PEFT; None: it belongs to an adapter."""
        for at, wrapper in self._wrappers:
            inside = f"{at}." if at else ""
            if path.startswith(inside):
                active = next(iter(wrapper.active_adapters), None) if not wrapper.disable_adapters else None
                kept = f"modules_to_save.{active}." if active in getattr(wrapper, "modules_to_save", {}) else "original_module."
                if not path.startswith(inside + kept):
                    return None
                return self._bare(inside + path[len(inside + kept):])
        for at in reversed(self._layers):
            inside = f"{at}." if at else ""
            if path.startswith(inside):
                rest = path[len(inside):]
                if not rest.startswith("base_layer."):
                    return None
                path = inside + rest.removeprefix("base_layer.")
        return self._bare(path)

    def _bare(self, path):
        return path.removeprefix(self._prefix)
