# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed's universal format, as ds_to_universal writes it.

    <tag>/zero/<parameter>/fp32.pt, exp_avg.pt, ...   {"param": the whole tensor, ...}; fp32.pt alone for buffers, frozen and tied weights
    <tag>/zero/<parameter>/step.pt                    a number
    <tag>/zero/optimizer_state.pt                     hyperparameters, loss scaler
    <tag>/*_model_states.pt                           as before the conversion
"""
import os

from deepspeed.checkpoint.foreign import module_states, sharded, torch_file
from deepspeed.checkpoint.foreign.contents import ForeignCheckpointError, ForeignTensor, Piece
from deepspeed.checkpoint.foreign.tensor_ref import TensorRef


def is_universal(folder):
    return os.path.isdir(os.path.join(folder, "zero"))


def read(contents, folder):
    zero = os.path.join(folder, "zero")
    paths = sorted(os.path.join(folder, name) for name in os.listdir(folder) if name.endswith("_model_states.pt"))
    states = [module_states.check(torch_file.load(path), path) for path in paths]
    shapes = {}
    if states:
        module_states.read_run(contents, states[0])
        shapes = {name: shape for group in module_states.shapes_of(states[0], paths[0]) for name, shape in group}
        module_states.read_module(contents, states[0], with_weights=False)
        if len(states) > 1 or states[0].get("frozen_param_shapes"):
            sharded.read_frozen_slices(contents, states, paths)
    buffers = set(contents.names("buffer"))
    for name in _parameters(zero):
        if name not in buffers and name not in contents.aliases:
            _read_parameter(contents, os.path.join(zero, name), name, shapes, trained=not shapes or name in shapes)
    missing = [name for name in shapes if ("fp32", name) not in contents.tensors]
    if missing:
        raise ForeignCheckpointError(f"{zero}: the weights of '{missing[0]}' are missing")
    rest = os.path.join(zero, "optimizer_state.pt")
    if os.path.exists(rest):
        state = torch_file.load(rest)
        groups = state.get("param_groups") or []
        # Converted from stage 3 there is no step.pt; the file keeps the numbers of one rank's groups.
        inner = (state.get("optimizer_state_dict") or {}).get("state") or {}
        step = next((number["step"] for number in inner.values() if isinstance(number, dict) and "step" in number), None)
        if step is not None:
            contents.steps = {**dict.fromkeys(shapes, sharded.number(step)), **contents.steps}
        sharded.read_rest(contents, state, {"param_groups": groups}, _names(states, paths, groups))
    contents.stage = None


def _parameters(zero):
    """Names of the parameters: folders with .pt files. A name may hold '/'."""
    found = []
    for folder, _, files in os.walk(zero):
        if folder != zero and any(file.endswith(".pt") for file in files):
            found.append(os.path.relpath(folder, zero))
    return sorted(found)


def _read_parameter(contents, folder, name, shapes, trained):
    for file in sorted(os.listdir(folder)):
        kind, extension = os.path.splitext(file)
        if extension != ".pt":
            continue
        path = os.path.join(folder, file)
        saved = torch_file.load(path)
        if kind == "step":
            contents.steps[name] = int(saved.item() if isinstance(saved, TensorRef) else saved)
            continue
        value = saved.get("param") if isinstance(saved, dict) else saved   # converted from stage 3: the bare tensor
        if not isinstance(value, TensorRef):
            raise ForeignCheckpointError(f"{path}: holds no tensor 'param'")
        if kind == "fp32" and not trained:
            if ("weight", name) in contents.tensors:
                continue   # a frozen weight, found in the dtype it was used in
            kind = "weight"
        contents.add(ForeignTensor(kind, name, value.dtype, shapes.get(name, value.shape), [Piece(0, value.numel, value, 0)]))


def _names(states, paths, groups):
    if not states:
        return []
    return sharded.grouped_names({"param_groups": groups}, module_states.shapes_of(states[0], paths[0]))
