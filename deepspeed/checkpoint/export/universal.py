# SPDX-License-Identifier: Apache-2.0
"""A checkpoint in DeepSpeed's universal format, which its engines load with "checkpoint": {"load_universal": true}. Layout: foreign/universal.py."""
import collections
import os
import re
import shutil
import sys

from deepspeed.checkpoint.export.stream import Instance, Named, Written, nbytes, write_torch
from deepspeed.checkpoint.export.weights import SourceTensor, frozen_names

_VERSION = "0.19.8"   # of the DeepSpeed whose layout this is
_STATE_DTYPE = "F32"
_KIND = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:-]*")


def write_universal(source, folder, progress=None):
    """Writes `source` as the tag folder `folder` and points latest_universal beside it there. Holds one chunk of a tensor at a time."""
    _check_names(source)
    _check_place(source, folder)
    part = f"{os.path.normpath(folder)}.part-{os.getpid()}"
    shutil.rmtree(part, ignore_errors=True)
    try:
        _write_tensors(source, os.path.join(part, "zero"), progress)
        write_torch(os.path.join(part, "zero", "optimizer_state.pt"), _optimizer_state(source))
        model = _model_state(source)
        # Engines of stage 3 look for the second name.
        for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt"):
            write_torch(os.path.join(part, name), model)
        if os.path.isdir(folder):
            os.rename(folder, part + ".old")
        os.rename(part, folder)
        shutil.rmtree(part + ".old", ignore_errors=True)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    latest = os.path.join(os.path.dirname(os.path.abspath(folder)), "latest_universal")
    with open(latest + ".part", "w", encoding="utf-8") as file:
        file.write(os.path.basename(os.path.normpath(folder)))
    os.replace(latest + ".part", latest)


def universal_bytes(source):
    """How much write_universal() will write of tensors."""
    return sum(nbytes(SourceTensor(source, info), _STATE_DTYPE) for (_, kind), info in source.tensors.items() if kind != "object")


def _check_names(source):
    """Names become paths here, and a manifest may come from anywhere."""
    groups = (source.state.get("optimizer") or {}).get("groups", ())
    names = [name for name, _ in source.tensors] + [name for group in groups for name in group["params"]]
    for name in names:
        if any(part in ("", ".", "..") for part in name.split("/")) or "\0" in name:
            raise ValueError(f"{source.path}: a parameter called {name!r} cannot have a folder of this name")
    for kind in {kind for _, kind in source.tensors}:
        if not _KIND.fullmatch(kind):
            raise ValueError(f"{source.path}: a state called {kind!r} cannot have a file of this name")


def _check_place(source, folder):
    """What is in the way is replaced only if it is an export itself."""
    here, source_at = os.path.realpath(folder), os.path.realpath(source.path)
    if os.path.commonpath([here, source_at]) == here:
        raise ValueError(f"{folder} holds the checkpoint that is to be converted, {source.path}: give another output folder")
    if os.path.lexists(folder) and not os.path.isfile(os.path.join(folder, "zero", "optimizer_state.pt")):
        if not os.path.isdir(folder) or os.listdir(folder):
            raise ValueError(f"{folder} exists and is not a universal checkpoint: give another output folder, or remove it")


def _write_tensors(source, zero, progress):
    optimizer = source.state.get("optimizer") or {}
    for (name, kind), info in source.tensors.items():
        if kind == "object":
            continue
        folder = os.path.join(zero, name)
        os.makedirs(folder, exist_ok=True)
        file = "fp32" if kind in ("weight", "buffer") else kind
        if kind == "weight" and (name, "fp32") in source.tensors:
            continue
        write_torch(os.path.join(folder, f"{file}.pt"), {"cat_dim": 0, "param": Written(SourceTensor(source, info), _STATE_DTYPE)}, progress)
    for group in optimizer.get("groups", ()):
        for name in group["params"]:
            write_torch(os.path.join(zero, name, "step.pt"), _steps(optimizer, name))


def _steps(optimizer, name):
    return int(optimizer.get("steps", 0)) - int((optimizer.get("missed_steps") or {}).get(name, 0))


def _optimizer_state(source):
    optimizer = source.state.get("optimizer") or {}
    groups = [{**_plain(group["values"]), "params": [number]} for number, group in enumerate(optimizer.get("groups", ()))]
    scaler = source.state.get("loss_scaler") or {}
    return {"loss_scaler": _loss_scaler(scaler), "dynamic_loss_scale": "cur_iter" in scaler, "overflow": False, "clip_grad": 0.0,
            "ds_version": _VERSION, "param_groups": groups,
            # where engines of stage 3 look
            "optimizer_state_dict": {"state": {number: {"step": int(optimizer.get("steps", 0))} for number in range(max(1, len(groups)))},
                                     "param_groups": groups}}


def _loss_scaler(saved):
    home = "deepspeed.runtime.fp16.loss_scaler"
    if "cur_iter" not in saved:
        return Instance(Named(home, "LossScaler"), {"cur_scale": float(saved.get("cur_scale", 1.0)), "dynamic": False})
    # What the engine's state does not keep is DeepSpeed's default.
    return Instance(Named(home, "DynamicLossScaler"), {
        "cur_scale": float(saved["cur_scale"]), "dynamic": True, "cur_iter": saved["cur_iter"], "last_overflow_iter": saved.get("last_overflow_iter", -1),
        "scale_factor": 2.0, "scale_window": 1000, "min_scale": 1, "delayed_shift": 2, "cur_hysteresis": saved.get("cur_hysteresis", 2),
        "consecutive_hysteresis": False, "raise_error_at_min_scale": True, "dtype": Named("torch", "float16")})


def _model_state(source):
    state, frozen = source.state, frozen_names(source)
    optimizer, counters = state.get("optimizer") or {}, state.get("counters") or {}
    buffers = [name for name, kind in source.tensors if kind == "buffer"]
    module = collections.OrderedDict((name, Written(SourceTensor(source, source.tensors[name, kind])))
                                     for name, kind in source.tensors if kind == "buffer" or (kind == "weight" and name in frozen))
    shapes = [collections.OrderedDict((name, _size(_shape(source, name))) for name in group["params"]) for group in optimizer.get("groups", ())]
    client = {key: _plain(value) for key, value in (state.get("client_state") or {}).items()}
    return {**client, "module": module, "buffer_names": buffers, "optimizer": None, "param_shapes": shapes, "frozen_param_shapes": None,
            "shared_params": dict(source.aliases), "frozen_param_fragments": None, "lr_scheduler": _plain(state.get("lr_scheduler")),
            "data_sampler": None, "random_ltd": None, "skipped_steps": counters.get("skipped_steps", 0),
            "global_steps": counters.get("global_steps", 0), "global_samples": counters.get("global_samples", 0),
            "dp_world_size": source.world_size or 1, "mp_world_size": 1, "ds_config": {}, "ds_version": _VERSION,
            "universal_checkpoint_info": {"universal_checkpoint_version": 0.4}}


def _shape(source, name):
    return next(source.tensors[name, kind].shape for kind in ("fp32", "weight") if (name, kind) in source.tensors)


class _Size:

    def __init__(self, shape):
        self.shape = tuple(shape)

    def __reduce__(self):
        return Named("torch", "Size"), (self.shape,)


def _size(shape):
    return _Size(shape)


def _plain(value):
    """Values that DeepSpeed's reader will know: numbers, texts, containers of them; torch tensors by their bytes."""
    torch = sys.modules.get("torch")   # without it there is no tensor
    if torch is not None and isinstance(value, torch.Tensor):
        return Written(_Held(value))
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        return type(value)(_plain(item) for item in value) if type(value) in (list, tuple) else [_plain(item) for item in value]
    return value


class _Held:
    """A torch tensor in memory, for Written."""

    def __init__(self, tensor):
        from deepspeed.checkpoint import dtypes
        self._bytes = memoryview(tensor.detach().cpu().contiguous().view(-1).view(_byte_type()).numpy()).cast("B") if tensor.numel() else memoryview(b"")
        self.dtype, self.shape, self.numel = dtypes.name_of(tensor.dtype), tuple(tensor.shape), tensor.numel()
        self.item_bytes = dtypes.item_bytes(self.dtype)

    def read_into(self, begin, buffer):
        view = memoryview(buffer).cast("B")
        view[:] = self._bytes[begin * self.item_bytes:begin * self.item_bytes + len(view)]


def _byte_type():
    import torch
    return torch.uint8
