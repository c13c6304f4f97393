# SPDX-License-Identifier: Apache-2.0
"""Whole weights out of a training checkpoint, ours or DeepSpeed's: the functions of deepspeed.utils.zero_to_fp32 and its scripts."""
import argparse
import collections
import contextlib
import os
import re
import shutil
from typing import NamedTuple

from deepspeed.checkpoint.export.elements import DTYPE_NAMES, dtype_named, target_of
from deepspeed.checkpoint.export.shards import parse_size, write_weights
from deepspeed.checkpoint.export.stream import chunks, nbytes
from deepspeed.checkpoint.export.weights import Weights
from deepspeed.checkpoint.location import open_checkpoint

_FILE_ENDINGS = (".bin", ".pt", ".pth", ".safetensors")


class LazyWeight:
    """A weight still in its checkpoint; `contiguous()` reads it."""

    def __init__(self, tensor, dtype):
        from deepspeed.checkpoint import dtypes
        import torch
        self._tensor, self._name = tensor, target_of(tensor.dtype, dtype)
        self.dtype, self.shape, self.device = dtypes.torch_dtype(self._name), torch.Size(tensor.shape), torch.device("cpu")

    def numel(self):
        return self._tensor.numel

    def contiguous(self):
        """The weight as a torch tensor on the CPU."""
        import torch
        whole = torch.empty(self.shape, dtype=self.dtype)
        into, at = whole.view(-1).view(torch.uint8).numpy().data if whole.numel() else b"", 0
        for chunk in chunks(self._tensor, self._name):
            into[at:at + len(chunk)] = chunk
            at += len(chunk)
        return whole


def get_fp32_state_dict_from_zero_checkpoint(checkpoint_dir, tag=None, exclude_frozen_parameters=False, lazy_mode=False):
    """The model's whole state_dict on the CPU, floating-point values in fp32. Needs no process group.

    checkpoint_dir: the folder given to save_checkpoint (or that of one tag); tag: None for what `latest` says. lazy_mode: the values are
    LazyWeight, which are read by `.contiguous()` one by one. Tied names share one tensor. Raises CheckpointError naming the file.
    """
    weights = Weights(open_checkpoint(checkpoint_dir, tag), exclude_frozen_parameters)
    state = collections.OrderedDict()
    for name, tensor in weights.tensors.items():
        weight = LazyWeight(tensor, "F32")
        state[name] = weight if lazy_mode else weight.contiguous()
    for alias, name in weights.aliases.items():
        state[alias] = state[name]
    return state


def to_torch_tensor(state_dict, return_empty_tensor=False, dtype=None):
    """Reads the lazy values of a state_dict; tied names go on sharing. return_empty_tensor: uninitialised ones of that shape, which cost no
    memory until written. dtype: what floating-point values become."""
    import torch
    result, made = {}, {}
    for name, value in state_dict.items():
        if id(value) not in made:
            wanted = dtype if dtype is not None and value.dtype.is_floating_point else value.dtype
            made[id(value)] = torch.empty(value.shape, dtype=wanted) if return_empty_tensor else value.contiguous().to(wanted)
        result[name] = made[id(value)]
    return result


def convert_zero_checkpoint_to_state_dict(checkpoint_dir, output_dir, dtype="float32", max_shard_size="5GB", safe_serialization=False, tag=None,
                                          exclude_frozen_parameters=False):
    """Writes the whole weights as pytorch_model.bin (safe_serialization: model.safetensors) into `output_dir`, in several files with an index when
    they are larger than max_shard_size; floating-point values become `dtype`. Holds 16 MiB, whatever the size. An `output_dir` that ends like a file
    (.bin, .pt, .safetensors) is written as this one file."""
    wanted = dtype_named(dtype)
    weights = Weights(open_checkpoint(checkpoint_dir, tag), exclude_frozen_parameters)
    parse_size(max_shard_size)
    with progress_bar(sum(nbytes(tensor, wanted) for tensor in weights.tensors.values()), "weights") as advance:
        if os.path.splitext(output_dir)[1] in _FILE_ENDINGS and not os.path.isdir(output_dir):
            _write_file(weights, output_dir, wanted, safe_serialization or output_dir.endswith(".safetensors"), advance)
        else:
            write_weights(weights, output_dir, wanted, max_shard_size, safe_serialization, advance)


def convert_zero_checkpoint_to_fp32_state_dict(checkpoint_dir, output_dir, max_shard_size="5GB", safe_serialization=False, tag=None,
                                               exclude_frozen_parameters=False):
    """convert_zero_checkpoint_to_state_dict in fp32."""
    convert_zero_checkpoint_to_state_dict(checkpoint_dir, output_dir, "float32", max_shard_size, safe_serialization, tag, exclude_frozen_parameters)


def _write_file(weights, path, dtype, safe, advance):
    folder = os.path.dirname(path) or "."
    scratch = os.path.join(folder, f".{os.path.basename(path)}.part-{os.getpid()}")
    try:
        (written,) = write_weights(weights, scratch, dtype, None, safe, advance)
        os.replace(written, path)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def load_state_dict_from_zero_checkpoint(model, checkpoint_dir, tag=None):
    """Moves the model to the CPU and gives it the checkpoint's weights, one at a time; names that only one side has are passed over."""
    import torch
    model = model.cpu()
    weights = Weights(open_checkpoint(checkpoint_dir, tag))
    targets = model.state_dict(keep_vars=True)
    with torch.no_grad():
        for name, target in targets.items():
            tensor = weights.tensors.get(weights.aliases.get(name, name))
            if tensor is None:
                continue
            if tuple(target.shape) != tuple(tensor.shape):
                raise RuntimeError(f"'{name}' has shape {list(tensor.shape)} in {checkpoint_dir} and {list(target.shape)} in the model")
            target.copy_(LazyWeight(tensor, "F32").contiguous())
    return model


# ---- DeepSpeed's files by themselves

class zero_model_state(NamedTuple):
    """What one *_model_states.pt says."""
    buffers: dict
    param_shapes: list
    shared_params: list
    ds_version: object
    frozen_param_shapes: object
    frozen_param_fragments: object


def get_model_state_file(checkpoint_dir, zero_stage):
    """Path of the first model file that DeepSpeed wrote at that stage. Raises FileNotFoundError."""
    _check_folder(checkpoint_dir)
    path = os.path.join(checkpoint_dir, ("zero_pp_rank_0_" if zero_stage == 3 else "") + "mp_rank_00_model_states.pt")
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path}: there is no such file")
    return path


def get_model_state_files(checkpoint_dir):
    return get_checkpoint_files(checkpoint_dir, "_model_states.pt")


def get_optim_files(checkpoint_dir):
    return get_checkpoint_files(checkpoint_dir, "_optim_states.pt")


def get_checkpoint_files(checkpoint_dir, ending):
    """Paths of the files with that ending (also as the pattern "*ending"), ranks in order. Raises FileNotFoundError when there are none."""
    _check_folder(checkpoint_dir)
    ending = ending.removeprefix("*")
    names = sorted((name for name in os.listdir(checkpoint_dir) if name.endswith(ending)), key=_natural)
    if not names:
        raise FileNotFoundError(f"{checkpoint_dir}: holds no *{ending}")
    return [os.path.join(checkpoint_dir, name) for name in names]


def _check_folder(folder):
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"{folder}: there is no such folder")


def _natural(name):
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def parse_model_states(files):
    """A zero_model_state for each file; buffers in fp32."""
    from deepspeed.checkpoint.foreign import torch_file
    from deepspeed.checkpoint.foreign.adapter import materialise
    result = []
    for file in files:
        state = torch_file.load(file)
        if not isinstance(state, dict) or "buffer_names" not in state:
            raise ValueError(f"{file}: is not a file of model states")
        buffers = {name: materialise(value) for name, value in state["module"].items() if name in state["buffer_names"]}
        buffers = {name: value.float() if value.is_floating_point() else value for name, value in buffers.items()}
        result.append(zero_model_state(buffers, _sizes(state["param_shapes"]), [list(pair) for pair in (state.get("shared_params") or {}).items()],
                                       state.get("ds_version"), _sizes(state.get("frozen_param_shapes")),
                                       materialise(state.get("frozen_param_fragments"))))
    return result


def _sizes(shapes):
    import torch
    if isinstance(shapes, list):
        return [_sizes(group) for group in shapes]
    return None if shapes is None else type(shapes)((name, torch.Size(shape)) for name, shape in shapes.items())


def parse_optim_states(files, ds_checkpoint_dir):
    """(stage, ranks, each rank's list of flat fp32 tensors, alignment paddings or None)"""
    from deepspeed.checkpoint.foreign import sharded
    from deepspeed.checkpoint.foreign.adapter import materialise
    parts = sharded.load_optim_files(list(files))
    key = "fp32_flat_groups" if parts[0]["zero_stage"] == 3 else "single_partition_of_fp32_groups"
    return parts[0]["zero_stage"], len(parts), [materialise(part[key]) for part in parts], parts[0].get("param_alignment_paddings")


# ---- the scripts

@contextlib.contextmanager
def progress_bar(total_bytes, what, show=None):
    """advance(bytes) of a bar on stderr, shown to terminals only."""
    from tqdm import tqdm
    with tqdm(total=total_bytes, desc=what, unit="B", unit_scale=True, disable=None if show is None else not show) as bar:
        yield bar.update


def main(arguments=None, with_dtype=False):
    """zero_to_fp32.py, and zero_to_torch.py when `with_dtype`."""
    parser = argparse.ArgumentParser(description="Writes the whole weights of a training checkpoint" + ("." if with_dtype else " in fp32."))
    parser.add_argument("checkpoint_dir", help="folder with the file 'latest', or of one tag")
    parser.add_argument("output_dir", help="folder to write to")
    if with_dtype:
        parser.add_argument("--dtype", required=True, choices=sorted(DTYPE_NAMES), help="of the weights written")
    parser.add_argument("--max_shard_size", default="5GB", help="largest size of one file (default: 5GB)")
    parser.add_argument("--safe_serialization", action="store_true", help="write safetensors instead of pickled files")
    parser.add_argument("-t", "--tag", help="which checkpoint (default: what 'latest' says)")
    parser.add_argument("--exclude_frozen_parameters", action="store_true", help="leave out weights that were not trained")
    parser.add_argument("-d", "--debug", action="store_true", help="show where an error comes from")
    chosen = parser.parse_args(arguments)
    try:
        convert_zero_checkpoint_to_state_dict(chosen.checkpoint_dir, chosen.output_dir, chosen.dtype if with_dtype else "float32", chosen.max_shard_size,
                                              chosen.safe_serialization, chosen.tag, chosen.exclude_frozen_parameters)
    except (OSError, ValueError, RuntimeError) as error:
        if chosen.debug:
            raise
        parser.exit(1, f"{parser.prog}: {error}\n")
