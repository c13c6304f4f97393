# SPDX-License-Identifier: Apache-2.0
"""Stages 1 to 3: every rank's *_optim_states.pt holds its part of flat tensors.

    stages 1, 2   per parameter group: single_partition_of_fp32_groups[g] and base_optimizer_state[...][g] are this rank's part of all of the group's
                  parameters laid end to end; param_slice_mappings[g] says which elements of that part are which parameter's. A parameter may begin on
                  one rank and end on the next ones.
    stage 3       per sub-group of parameters: fp32_flat_groups[g] and optimizer_state_dict[...][g] are one slice of every parameter, end to end;
                  rank r of n holds elements [r*k, (r+1)*k) of each, k = ceil(numel / n), the last ones padded.
"""
import math
import os
import re

from deepspeed.checkpoint.foreign import module_states, torch_file
from deepspeed.checkpoint.foreign.contents import ForeignCheckpointError, ForeignTensor, Piece
from deepspeed.checkpoint.foreign.tensor_ref import TensorRef
from deepspeed.checkpoint.foreign.unpickle import Record

_OPTIM_FILE = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")


def optim_files(folder):
    """The optimizer files by rank; [] when there are none."""
    found = {}
    for name in os.listdir(folder):
        match = _OPTIM_FILE.fullmatch(name)
        if match:
            if int(match[2]):
                raise ForeignCheckpointError(f"{folder}/{name}: belongs to model-parallel rank {int(match[2])}, which cannot be read yet")
            if int(match[1]) in found:
                raise ForeignCheckpointError(f"{folder}: holds two optimizer files of rank {int(match[1])}: {found[int(match[1])]} and {name}")
            found[int(match[1])] = name
    return consecutive(found, folder, "optimizer states")


def consecutive(found, folder, what):
    missing = sorted(set(range(max(found, default=-1) + 1)) - set(found))
    if missing:
        raise ForeignCheckpointError(f"{folder}: the {what} of rank {missing[0]} are missing")
    return [os.path.join(folder, found[rank]) for rank in range(len(found))]


def load_optim_files(paths):
    """The 'optimizer_state_dict' of every rank, checked to be whole and of one kind."""
    parts = []
    for path in paths:
        state = torch_file.load(path)
        part = state.get("optimizer_state_dict") if isinstance(state, dict) else None
        if isinstance(part, dict) and "zero_stage" not in part and "single_partition_of_fp32_groups" in part:
            part["zero_stage"] = 1   # bf16 training with fp32 accumulation shards the optimizer and does not say so
        if not isinstance(part, dict) or not isinstance(part.get("zero_stage"), int):
            raise ForeignCheckpointError(f"{path}: is not a file of ZeRO's optimizer states")
        if part["zero_stage"] != (parts or [part])[0]["zero_stage"]:
            raise ForeignCheckpointError(f"{path}: was written at stage {part['zero_stage']}, that of rank 0 at stage {parts[0]['zero_stage']}")
        parts.append(part)
    counts = parts[0].get("partition_count")
    expected = max(counts) if isinstance(counts, list) else counts
    if expected != len(paths):
        raise ForeignCheckpointError(f"{os.path.dirname(paths[0])}: was written by {expected} ranks, and the optimizer states of {len(paths)} are here")
    return parts


# ---- stages 1 and 2

def read_flat_groups(contents, state, path, paths):
    parts = load_optim_files(paths)
    contents.stage = parts[0]["zero_stage"]
    module_states.read_module(contents, state)
    shapes = {name: shape for group in module_states.shapes_of(state, path) for name, shape in group}
    collected = {}
    for part, file in zip(parts, paths):
        bases = _per_group(part["base_optimizer_state"])
        for group, (mapping, master) in enumerate(zip(_mappings(part, state, path, parts, file), part["single_partition_of_fp32_groups"])):
            flats = {"fp32": master, **bases[group]}
            for name, (start, numel) in mapping.items():
                if name not in shapes:
                    raise ForeignCheckpointError(f"{file}: holds states of '{name}', of which the model's file knows no shape")
                for kind, flat in flats.items():
                    if kind == "step":
                        contents.steps[name] = number(flat)
                    elif isinstance(flat, TensorRef) and flat.shape:
                        collected.setdefault((kind, name), []).append((start, numel, flat))
    for (kind, name), fragments in collected.items():
        _add_joined(contents, kind, name, shapes[name], fragments)
    read_rest(contents, parts[0], parts[0]["base_optimizer_state"], [[name for name, _ in group] for group in module_states.shapes_of(state, path)])


def _per_group(base):
    """The optimizer's states of each group, whichever way they were saved."""
    if isinstance(base, dict):
        states = base["state"]
        return [states.get(index, {}) for index in range(len(base["param_groups"]))]
    return list(base)   # elastic: the states of each group, without their padding


def _mappings(part, state, path, parts, file):
    saved = part.get("param_slice_mappings")
    if saved is None:
        raise ForeignCheckpointError(f"{file}: has no 'param_slice_mappings': it was written by a version too old to be read")
    result = []
    for mapping in saved:
        fragments = {}
        for name, address in mapping.items():
            if not isinstance(address, Record) or not all(isinstance(getattr(address, key, None), int) for key in ("start", "numel")):
                raise ForeignCheckpointError(f"{file}: where '{name}' lies is not told")
            fragments[name] = (address.start, address.numel)
        result.append(fragments)
    return result


def _add_joined(contents, kind, name, shape, fragments):
    """Fragments in the order of ranks follow each other in the parameter."""
    pieces, begin = [], 0
    for start, numel, flat in fragments:
        if start < 0 or numel < 0 or start + numel > flat.numel:
            raise ForeignCheckpointError(f"{flat.storage.path}: {kind} of '{name}' is said to lie at [{start}, {start + numel}) of {flat.numel} elements")
        pieces.append(Piece(begin, numel, flat, start))
        begin += numel
    contents.add(ForeignTensor(kind, name, fragments[0][2].dtype, shape, pieces))


# ---- stage 3

def read_slices(contents, states, paths, model_paths):
    """`states`: every rank's model file."""
    parts = load_optim_files(paths)
    contents.stage = 3
    module_states.read_module(contents, states[0], with_weights=False)
    groups = module_states.shapes_of(states[0], model_paths[0])
    ranks = len(parts)
    sources = [_rank_flats(part, file) for part, file in zip(parts, paths)]
    for kind in sources[0]:
        at = 0
        for name, shape in (entry for group in groups for entry in group):
            numel, step = _partition(shape, ranks)
            if all(kind in flats for flats in sources):
                pieces = []
                for rank, flats in enumerate(sources):
                    mine = min(step, max(0, numel - rank * step))
                    pieces += flats[kind].pieces(rank * step, mine, at, name)
                contents.add(ForeignTensor(kind, name, sources[0][kind].dtype, shape, pieces))
            at += step
    for index, group in enumerate(groups):
        step = sources[0]["fp32"].steps[index] if index < len(sources[0]["fp32"].steps) else None
        contents.steps.update((name, step) for name, _ in group if step is not None)
    read_frozen_slices(contents, states, model_paths)
    read_rest(contents, parts[0], parts[0]["optimizer_state_dict"], grouped_names(parts[0]["optimizer_state_dict"], groups))


def _partition(shape, ranks):
    numel = math.prod(shape)
    return numel, -(-numel // ranks)


class _Flats:
    """One kind's flat tensors of one rank, end to end."""

    def __init__(self, tensors, steps, file, kind):
        self.tensors, self.steps, self.file, self.kind = tensors, steps, file, kind
        self.dtype = tensors[0].dtype

    def pieces(self, begin, numel, at, name):
        """Elements [at, at + numel) of the row of tensors, as pieces of a parameter from `begin` on."""
        found, low = [], 0
        for tensor in self.tensors:
            first, last = max(at, low), min(at + numel, low + tensor.numel)
            if first < last:
                found.append(Piece(begin + first - at, last - first, tensor, first - low))
            low += tensor.numel
        if sum(piece.numel for piece in found) != numel:
            raise ForeignCheckpointError(f"{self.file}: {self.kind} of '{name}' should lie at [{at}, {at + numel}) of {low} elements")
        return found


def _rank_flats(part, file):
    masters = part.get("fp32_flat_groups")
    inner = part.get("optimizer_state_dict")
    if not masters or not isinstance(inner, dict):
        raise ForeignCheckpointError(f"{file}: has no fp32 weights of stage 3 (an optimizer on NVMe keeps them in offloaded_tensors, which cannot be read yet)")
    states = [inner["state"].get(index, {}) for index in range(len(masters))]
    steps = [number(state["step"]) for state in states if "step" in state]
    found = {"fp32": _Flats(masters, steps, file, "fp32")}
    for kind in dict.fromkeys(key for state in states for key, value in state.items() if isinstance(value, TensorRef) and value.shape):
        tensors = [state.get(kind) for state in states]
        if all(isinstance(tensor, TensorRef) for tensor in tensors):
            found[kind] = _Flats(tensors, steps, file, kind)
    return found


def read_frozen_slices(contents, states, paths):
    shapes = states[0].get("frozen_param_shapes") or {}
    for name, shape in shapes.items():
        numel, step = _partition(shape, len(states))
        pieces = []
        for rank, (state, path) in enumerate(zip(states, paths)):
            fragment = (state.get("frozen_param_fragments") or {}).get(name)
            mine = min(step, max(0, numel - rank * step))
            if not isinstance(fragment, TensorRef) or fragment.numel < mine:
                raise ForeignCheckpointError(f"{path}: the part of the frozen weight '{name}' is missing")
            pieces.append(Piece(rank * step, mine, fragment, 0))
        contents.add(ForeignTensor("weight", name, pieces[0].source.dtype, shape, pieces))


def grouped_names(inner, groups):
    """Stage 3 keeps its own list of sub-groups; the optimizer has one group for each, or the names cannot be told apart."""
    names = [[name for name, _ in group] for group in groups]
    return names if len(inner["param_groups"]) == len(names) else [[name for group in names for name in group]]


# ---- both

def read_rest(contents, part, base, names):
    contents.loss_scaler = _scaler(part.get("loss_scaler"), part)
    groups = base["param_groups"] if isinstance(base, dict) else []
    for group, members in zip(groups, names):
        contents.groups.append(dict({key: value for key, value in group.items() if key != "params"}, params=list(members)))


def _scaler(saved, part):
    if not isinstance(saved, Record):
        return None
    fields = {key: value for key, value in vars(saved).items() if isinstance(value, (int, float, bool)) or value is None}
    fields["dynamic_loss_scale"] = bool(part.get("dynamic_loss_scale", False))
    return fields


def number(value):
    return int(value.item() if isinstance(value, TensorRef) else value)
