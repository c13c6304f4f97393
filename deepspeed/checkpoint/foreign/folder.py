# SPDX-License-Identifier: Apache-2.0
"""Which kind of DeepSpeed folder a path is, and its Contents."""
import os
import re

from deepspeed.checkpoint.foreign import module_states, sharded, stage0, torch_file, universal
from deepspeed.checkpoint.foreign.contents import Contents, ForeignCheckpointError

_MODEL_FILE = re.compile(r"mp_rank_(\d+)_model_states\.pt")
_MODEL_PART = re.compile(r"zero_pp_rank_(\d+)_mp_rank_(\d+)_model_states\.pt")


def is_foreign(folder):
    """Whether `folder` is a checkpoint (one tag) that DeepSpeed wrote, universal ones included. Opens nothing."""
    try:
        names = os.listdir(folder)
    except OSError:
        return False
    return universal.is_universal(folder) or any(_MODEL_FILE.fullmatch(name) or _MODEL_PART.fullmatch(name) for name in names)


def read(folder, group_names=None):
    """The Contents of a tag's folder.

    group_names: for stage 0, the parameter names of each of the optimizer's groups; see stage0.py.
    Raises ForeignCheckpointError, TorchFileError and UnsafePickleError, naming the file.
    """
    folder = os.fspath(folder)
    contents = Contents(folder)
    if universal.is_universal(folder):
        universal.read(contents, folder)
        return _finish(contents)
    _refuse_unknown(folder)
    whole, parts = _model_files(folder)
    optims = sharded.optim_files(folder)
    if parts:
        states = [module_states.check(torch_file.load(path), path) for path in parts]
        if not optims:
            raise ForeignCheckpointError(f"{folder}: holds no optimizer states, in which the weights of stage 3 lie")
        if len(states) != len(optims):
            raise ForeignCheckpointError(f"{folder}: holds the model states of {len(states)} ranks and the optimizer states of {len(optims)}")
        module_states.read_run(contents, states[0])
        sharded.read_slices(contents, states, optims, parts)
    elif whole:
        state = module_states.check(torch_file.load(whole), whole)
        module_states.read_run(contents, state)
        if optims:
            sharded.read_flat_groups(contents, state, whole, optims)
        else:
            stage0.read(contents, state, whole, group_names)
    else:
        raise ForeignCheckpointError(f"{folder}: holds no *_model_states.pt")
    return _finish(contents)


def _refuse_unknown(folder):
    for name in sorted(os.listdir(folder)):
        if re.fullmatch(r"layer_.*model_states\.pt", name):
            kind = "experts" if "expert" in name else "pipeline stages"
            raise ForeignCheckpointError(f"{folder}/{name}: a checkpoint of {kind} cannot be read yet")
        if name == "offloaded_tensors":
            raise ForeignCheckpointError(f"{folder}/{name}: optimizer states that DeepSpeed kept on NVMe cannot be read; save once without NVMe offload, "
                                         "or convert with ds_to_universal of the version that wrote them")


def _model_files(folder):
    """(path of the one model file or None, the paths by rank of stage 3)."""
    whole, parts = None, {}
    for name in os.listdir(folder):
        match = _MODEL_FILE.fullmatch(name)
        part = _MODEL_PART.fullmatch(name)
        if (match and int(match[1])) or (part and int(part[2])):
            raise ForeignCheckpointError(f"{folder}/{name}: belongs to a model-parallel rank, which cannot be read yet")
        if match:
            whole = os.path.join(folder, name)
        elif part:
            parts[int(part[1])] = name
    return whole, sharded.consecutive(parts, folder, "model states")


def _finish(contents):
    trained = set(contents.names("fp32")) | set(contents.steps)
    for group in contents.groups:
        trained.update(group["params"])
    if contents.stage != 0 or not contents.unnamed:
        contents.frozen = {name for name in contents.names("weight") if name not in trained} if trained else set()
    contents.origin = f"DeepSpeed {contents.version or '(unknown version)'}, " + (
        "universal format" if contents.stage is None else f"stage {contents.stage}, {contents.world_size} rank{'s' * (contents.world_size != 1)}")
    return contents
