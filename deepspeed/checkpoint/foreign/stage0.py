# SPDX-License-Identifier: Apache-2.0
"""Stage 0: the optimizer's whole state lies in the model's file, by numbers.

Note [Names at stage 0]: torch numbers an optimizer's parameters through its groups in order, and DeepSpeed's file does not say which number is
which name. Who loads into an engine knows the names of its groups and passes them. Without an engine the numbers are matched by what is
unmistakable: fp32 masters whose rounding is a stored weight, or shapes that fit the trained parameters in one way only.
"""
import math
import numpy

from deepspeed.checkpoint.foreign import module_states
from deepspeed.checkpoint.foreign.contents import ForeignCheckpointError, ForeignTensor, Piece
from deepspeed.checkpoint.foreign.tensor_ref import TensorRef


def read(contents, state, path, group_names=None):
    module_states.read_module(contents, state)
    saved = state.get("optimizer")
    contents.stage = 0
    if not saved:
        return
    inner = saved.get("optimizer_state_dict", saved)
    masters = _masters(saved)
    if masters is not None:
        _read_scaler(contents, saved)
    counts = [len(group["params"]) for group in inner["param_groups"]]
    sizes = _sizes(inner, masters)
    names = group_names if group_names is not None else _guess(contents, sizes, masters)
    if names is None:
        contents.unnamed = (f"{path}: the file numbers the optimizer's parameters and does not name them, and their shapes fit several; "
                            "load it with an engine, whose groups name them")
        return
    _check_names(contents, names, sizes, path)
    for index, (group, members) in enumerate(zip(inner["param_groups"], names)):
        contents.groups.append(dict({key: value for key, value in group.items() if key != "params"}, params=list(members)))
        if masters is not None and isinstance(masters[index], TensorRef):
            _read_flat(contents, members, masters[index], inner["state"].get(group["params"][0], {}))
        else:
            for position, (name, number) in enumerate(zip(members, group["params"])):
                shape = contents.tensors["weight", name].shape
                if masters is not None:
                    contents.add(_shaped("fp32", name, masters[index][position], shape))
                _read_states(contents, name, inner["state"].get(number, {}), lambda value: _shaped, shape)
    assert len(counts) == len(contents.groups)


def _masters(saved):
    if saved.get("fp32_groups") is not None:
        return saved["fp32_groups"]
    return saved.get("fp32_groups_flat")


def _read_scaler(contents, saved):
    contents.loss_scaler = {key: saved[key] for key in ("dynamic_loss_scale", "cur_scale", "cur_iter", "last_overflow_iter", "scale_factor", "scale_window")
                            if key in saved}


def _shaped(kind, name, reference, shape, at=0):
    return ForeignTensor(kind, name, reference.dtype, shape, [Piece(0, math.prod(shape), reference, at)])


def _read_states(contents, name, states, place, shape, at=0):
    """One parameter's optimizer states; a number of steps is no tensor of the parameter."""
    for key, value in states.items():
        if key == "step":
            contents.steps[name] = int(value.item() if isinstance(value, TensorRef) else value)
        elif isinstance(value, TensorRef) and value.shape:
            contents.add(_shaped(key, name, value, shape, at))


def _read_flat(contents, members, master, states):
    """Masters and states of a whole group in one flat tensor each."""
    at = 0
    for name in members:
        shape = contents.tensors["weight", name].shape
        contents.add(_shaped("fp32", name, master, shape, at))
        _read_states(contents, name, states, None, shape, at)
        at += contents.tensors["weight", name].numel


def _sizes(inner, masters):
    """For each group the shapes of its parameters in order, or the whole number of elements when they are flat; None where nothing tells."""
    result = []
    for index, group in enumerate(inner["param_groups"]):
        if masters is not None and isinstance(masters[index], TensorRef):
            result.append(masters[index].numel)
        elif masters is not None:
            result.append([master.shape for master in masters[index]])
        else:
            states = [inner["state"].get(number, {}) for number in group["params"]]
            result.append([next((value.shape for key, value in state.items() if isinstance(value, TensorRef) and value.shape), None) for state in states])
    return result


def _check_names(contents, names, sizes, path):
    if len(names) != len(sizes):
        raise ForeignCheckpointError(f"{path}: its optimizer has {len(sizes)} parameter groups, this one {len(names)}")
    for index, (members, size) in enumerate(zip(names, sizes)):
        missing = [name for name in members if ("weight", name) not in contents.tensors]
        if missing:
            raise ForeignCheckpointError(f"{path}: group {index} of this optimizer has {missing[0]!r}, which the file does not hold")
        shapes = [contents.tensors["weight", name].shape for name in members]
        fits = sum(contents.tensors["weight", name].numel for name in members) <= size if isinstance(size, int) else (
            len(size) == len(shapes) and all(saved is None or saved == shape for saved, shape in zip(size, shapes)))
        if not fits:
            raise ForeignCheckpointError(f"{path}: group {index} of its optimizer holds parameters of shapes {size}, this one's are {shapes}")


def _guess(contents, sizes, masters):
    """Names for the numbers, or None. See Note [Names at stage 0]."""
    left = {name: contents.tensors["weight", name] for name in contents.names("weight")}
    found = []
    for index, size in enumerate(sizes):
        if isinstance(size, int):
            return _whole_model(left, sizes)
        members = []
        for position, shape in enumerate(size):
            candidates = [name for name, tensor in left.items() if shape is None or tensor.shape == shape]
            if len(candidates) > 1 and masters is not None:
                candidates = [name for name in candidates if _rounds_to(masters[index][position], left[name])]
            if len(candidates) != 1:
                return _whole_model(left, sizes) if not found and not members else None
            members.append(candidates[0])
            del left[candidates[0]]
        found.append(members)
    return found


def _whole_model(left, sizes):
    """All weights in the order of the module, when one group holds all of them."""
    if len(sizes) != 1:
        return None
    if isinstance(sizes[0], int):
        total = sum(tensor.numel for tensor in left.values())
        return [list(left)] if total <= sizes[0] < total + 4096 else None
    return [list(left)] if sizes[0] == [tensor.shape for tensor in left.values()] else None


def _rounds_to(master, weight):
    """Whether the first elements of the fp32 master, rounded, are the stored weight's."""
    count = min(master.numel, 4096)
    values = numpy.empty(count, numpy.float32)
    master.read_into(0, values.data.cast("B"))
    stored = bytearray(count * weight.item_bytes)
    weight.read_into(0, stored)
    if weight.dtype == "F16":
        with numpy.errstate(over="ignore"):
            return bool((values.astype(numpy.float16).view(numpy.uint16) == numpy.frombuffer(stored, numpy.uint16)).all())
    if weight.dtype == "BF16":
        bits = values.view(numpy.uint32).astype(numpy.uint64)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(numpy.uint16)
        return bool((rounded == numpy.frombuffer(stored, numpy.uint16)).all())
    return bool((values == numpy.frombuffer(stored, numpy.float32)).all()) if weight.dtype == "F32" else False
