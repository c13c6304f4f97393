# SPDX-License-Identifier: Apache-2.0
"""Pretrained weights into a model, sharded ones slice by slice: each rank reads the bytes it keeps."""
import json
import math
import os
from typing import NamedTuple

import torch

from deepspeed._native import core
from deepspeed.checkpoint.range_source import RangeSource
from deepspeed.checkpoint.filling import Filling
from deepspeed.checkpoint.foreign import torch_file
from deepspeed.checkpoint.foreign.tensor_ref import ITEM_BYTES, StorageRef, TensorRef
from deepspeed.checkpoint.names import order_of
from deepspeed.checkpoint.pieces import Piece
from deepspeed.checkpoint.ranks import GroupRanks, Ranks
from deepspeed.checkpoint.source import CheckpointError, TensorInfo
from deepspeed.data.token_drop import without_wrappers
from deepspeed.telemetry import logger
from deepspeed.zero.gathered import GatheredParameters
from deepspeed.zero.managed import home_of

_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SINGLE = ("model.safetensors", "pytorch_model.bin")
_LISTED = 20
_INDEX_LIMIT_BYTES = 1 << 30


class LoadReport(NamedTuple):
    """Names that only the model has, that only the files have, and those of another shape: (name, shape in the model, shape in the files)."""
    missing: list
    unexpected: list
    mismatched: list


def load_pretrained_shards(model, folder, strict=True):
    """Gives the model the weights in `folder`: model.safetensors, the sharded form with its index, or torch's .bin files of the same names.

    model: a plain module, one built under zero.Init, or an engine (call it before training). Names are those of model.state_dict(); tied
    weights may be stored under any of their names. Sharded parameters are filled in place: a rank reads only its own slices, converted to the
    parameter's dtype while reading, and holds 64 MiB besides. folder: also the path of one file.

    Returns a LoadReport. strict: names that do not fit raise CheckpointError, listing them, before anything is changed. Collective when the model
    is sharded or an engine's: every rank calls it with the same files. What one rank cannot read is a CheckpointError on all of them.
    """
    module = getattr(model, "module", model) if hasattr(model, "save_checkpoint") else model

    def match():
        source, names = _open(os.fspath(folder)), _Names(module)
        found, report = _match(source, names)
        _refuse_or_tell(source, report, strict)
        return source, names, found, report

    ranks = ranks_of(module.parameters())
    source, names, found, report = match() if ranks is None else ranks.attempt(match, f"loading {os.fspath(folder)}")
    fill(source, [(name, info, names.parameters.get(name, names.buffers.get(name))) for name, info in found.items()])
    return report


# ---- files

def _open(folder):
    references = {}
    for path in _files(folder):
        for name, reference in (read_safetensors(path) if path.endswith(".safetensors") else _read_torch(path)).items():
            if name in references:
                raise CheckpointError(f"{folder}: '{name}' is in {os.path.basename(references[name].storage.path)} and in {os.path.basename(path)}")
            references[name] = reference
    return source_of(folder, references)


def source_of(path, readers):
    """The RangeSource of {name: reader}; kind is "weight" throughout. `path`: for messages."""
    return RangeSource(path, {(name, "weight"): reader for name, reader in readers.items()},
                       {(name, "weight"): TensorInfo(name, "weight", reader.dtype, reader.shape, (), ()) for name, reader in readers.items()})


def _files(folder):
    if os.path.isfile(folder):
        if folder.endswith(".index.json"):
            return _indexed(folder)
        return [folder]
    for name in _SINGLE:
        if os.path.isfile(os.path.join(folder, name)):
            return [os.path.join(folder, name)]
    for name in _INDEXES:
        if os.path.isfile(os.path.join(folder, name)):
            return _indexed(os.path.join(folder, name))
    found = sorted(name for name in os.listdir(folder) if name.endswith(".safetensors")) if os.path.isdir(folder) else []
    if not found:
        raise CheckpointError(f"{folder}: holds neither {' nor '.join(_SINGLE)}, nor an index of several, nor other .safetensors files")
    return [os.path.join(folder, name) for name in found]


def _indexed(path):
    """The files that an index names, which must lie beside it."""
    try:
        with open(path, "rb") as file:
            weight_map = json.loads(file.read(_INDEX_LIMIT_BYTES))["weight_map"]
        names = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: is not an index of weights: {error}") from error
    for name in names:
        if not isinstance(name, str) or os.path.basename(name) != name or name in ("", ".", ".."):
            raise CheckpointError(f"{path}: names the file {name!r}, which is not one beside it")
        if not os.path.isfile(os.path.join(os.path.dirname(path), name)):
            raise CheckpointError(f"{path}: names the file {name}, which is missing")
    return [os.path.join(os.path.dirname(path), name) for name in names]


def read_safetensors(path):
    """{name: TensorRef} of a file."""
    try:
        listed = core().SafetensorsReader(path).tensors   # checks that entries follow each other and fill the file
        at = os.path.getsize(path) - sum(ITEM_BYTES[dtype] * math.prod(shape) for dtype, shape in listed.values())
    except (OSError, RuntimeError, ValueError) as error:
        text = str(error)
        raise CheckpointError(text if path in text else f"{path}: {text}") from error
    references = {}
    for name, (dtype, shape) in listed.items():
        count = math.prod(shape)
        stride = [math.prod(shape[i + 1:]) for i in range(len(shape))]
        references[name] = TensorRef(StorageRef(path, at, dtype, count), 0, shape, stride)
        at += count * ITEM_BYTES[dtype]
    return references


def _read_torch(path):
    try:
        state = torch_file.load(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(str(error)) from error
    state = state.get("module", state) if isinstance(state, dict) else state
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: is not a state_dict")
    return {name: value for name, value in state.items() if isinstance(value, TensorRef)}


# ---- names

class _Names:
    """Parameters and persistent buffers by their first name in state_dict(); the store of a zero.Init model knows other, shorter names."""

    def __init__(self, module):
        self.parameters, self.buffers, self._all = {}, {}, {}
        for name, parameter in module.named_parameters(remove_duplicate=False):
            self._add(self.parameters, name, parameter)
        for path, owner in module.named_modules(remove_duplicate=False):
            for key, buffer in owner._buffers.items():
                if buffer is not None and key not in owner._non_persistent_buffers_set:
                    self._add(self.buffers, f"{path}.{key}" if path else key, buffer)

    def _add(self, table, name, tensor):
        spellings = self._all.setdefault(id(tensor), [])
        if not spellings:
            table[without_wrappers(name)] = tensor
        spellings.append(without_wrappers(name))

    def all_names(self, tensor):
        return self._all[id(tensor)]


def _match(source, names):
    """({name in the model: TensorInfo}, LoadReport)"""
    found, missing, mismatched, known = {}, [], [], set()
    for name, target in (*names.parameters.items(), *names.buffers.items()):
        spellings = names.all_names(target)
        known.update(spellings)
        info = next((source.tensors[spelling, "weight"] for spelling in spellings if (spelling, "weight") in source.tensors), None)
        if info is None:
            missing.append(name)
        elif tuple(info.shape) != tuple(target.shape):
            mismatched.append((name, tuple(target.shape), tuple(info.shape)))
        else:
            found[name] = info
    unexpected = [name for name, _ in source.tensors if name not in known]
    return found, LoadReport(missing, unexpected, mismatched)


def _refuse_or_tell(source, report, strict):
    lines = [f"'{name}' is in the model, not in the files" for name in report.missing]
    lines += [f"'{name}' has shape {list(ours)} in the model and {list(theirs)} in the files" for name, ours, theirs in report.mismatched]
    lines += [f"'{name}' is in the files, not in the model" for name in report.unexpected]
    if not lines:
        return
    text = "\n  ".join(lines[:_LISTED] + ([f"... and {len(lines) - _LISTED} more"] if len(lines) > _LISTED else []))
    if strict:
        raise CheckpointError(f"{source.path} does not fit the model (strict=False loads what fits):\n  {text}")
    logger.warning(f"{source.path} was loaded, except:\n  {text}")


# ---- values

@torch.no_grad()
def fill(source, wanted):
    """Reads into parameters and buffers what this rank keeps of them. wanted: (name for messages, TensorInfo of the source, tensor of its
    shape). Collective when parameters are sharded or an engine's: what one rank cannot read is then a CheckpointError on all."""
    filling, owners, engines = Filling(source), {}, {}
    ranks, what = ranks_of(target for _, _, target in wanted), f"loading {source.path}"

    def plan():
        for name, info, target in wanted:
            home = home_of(target)
            if home is not None:
                home.owner.refuse_while_away(what, "lp_params", "hp_params")
            if home is None:
                _fill_plain(filling, name, info, target)
            elif _has_masters(home):
                engines.setdefault((id(home.owner), home.unit), (home, []))[1].append((info, target))
            else:
                owners[id(home.owner)] = home.owner
                for begin, data in _slices(home, target):
                    filling.add(info, Piece(info.name, "weight", tuple(target.shape), order_of(target), begin, data))

    if ranks is None:
        plan()
        filling.run()
        return
    ranks.attempt(plan, what)
    for owner in owners.values():
        owner.transports.world.barrier("loading")   # a peer may still be gathering from the memory that is filled now
    ranks.together(torch.no_grad()(filling.run), what)   # grad mode is a thread's own
    for owner in owners.values():
        _publish(owner)
    for home, members in engines.values():
        _fill_whole(source, home, members, ranks, what)


def ranks_of(tensors):
    """The ranks that keep parts of these parameters, or their masters; None: no others than this one."""
    worlds = {}
    for home in filter(None, map(home_of, tensors)):
        worlds[id(home.owner.transports.world)] = home.owner.transports.world
    if not worlds:
        return None
    return GroupRanks(*worlds.values()) if len(worlds) == 1 else Ranks()


def _fill_plain(filling, name, info, target):
    if target.is_meta:
        raise CheckpointError(f"'{name}' is on the meta device and has no memory: build the model under deepspeed.zero.Init, or call to_empty() first")
    data, order = target.detach(), order_of(target)
    flat = data.permute(order) if order else data
    if flat.is_contiguous():
        filling.add(info, Piece(info.name, "weight", tuple(target.shape), order, 0, flat.view(-1)))
    else:
        data.copy_(filling.source.read(info.name, info.kind).to(data.dtype))


def _has_masters(home):
    """Whether an engine keeps other copies of the parameter, which have to follow."""
    store = home.owner.store
    _, flat, _ = store.param_place(home.index)
    return bool(store.flat_info(flat)["trainable"])


def _slices(home, parameter):
    """(first element, memory) of what this rank keeps of the parameter: its slice, and the whole while it is gathered."""
    store = home.owner.store
    _, flat, slot = store.param_place(home.index)
    full = store.full(flat)
    if full is not None:
        _, offset, numel = store.flat_info(flat)["slots"][slot]
        yield 0, full.narrow(0, offset, numel)
    if store.shards_params:
        begin, _, numel = store.slice_of(home.index, store.rank)
        if numel:
            yield begin, home.owner.local_slice(parameter)


def _publish(owner):
    """Collective: peers see the new slices."""
    world = owner.transports.world
    world.barrier("loaded")
    owner.store.publish_all()
    owner.store.refresh_full()
    world.barrier("loaded")


def _fill_whole(source, home, members, ranks, what):
    """A unit of an engine: gathered, filled by every rank, and written back, so that masters follow."""
    store = home.owner.store

    def read():
        for info, target in members:
            target.data.copy_(source.read(info.name, info.kind).to(target.dtype))

    with GatheredParameters([target for _, target in members]):
        ranks.attempt(read, what)
        store.write_back(home.unit)
