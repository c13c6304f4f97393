# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed's folders as a CheckpointSource: engines and tools read them as they read ours."""
import argparse
import pickle
import types
import zipfile

from deepspeed.checkpoint import dtypes
from deepspeed.checkpoint.foreign import folder as folders
from deepspeed.checkpoint.foreign.tensor_ref import TensorRef
from deepspeed.checkpoint.foreign.torch_file import TorchFileError
from deepspeed.checkpoint.foreign.unpickle import DeviceName, DtypeName, Record
from deepspeed.checkpoint.range_source import RangeSource
from deepspeed.checkpoint.source import CheckpointError, DamageError, TensorInfo, file_error


class ForeignCheckpoint(RangeSource):
    """One tag's folder that DeepSpeed wrote (stages 0 to 3, or universal).

    group_names: parameter names of each group of the optimizer that is to take the states, in order. Only stage 0 needs them, whose files
    number parameters instead of naming them; without them its optimizer states are there as far as they can be told apart
    (`unnamed` says why when they are not).

    Raises CheckpointError naming the file: when the folder is not whole, was written by parallelism that cannot be read, or holds a pickled
    object that DeepSpeed's checkpoints do not contain.
    """

    def __init__(self, folder, group_names=None):
        try:
            contents = folders.read(folder, group_names)
        except OSError as error:
            raise file_error(error, f"{error.filename or folder}: {error.strerror or error}") from error
        except TorchFileError as error:
            raise DamageError(str(error)) from error
        except (ValueError, pickle.UnpicklingError) as error:
            raise CheckpointError(str(error)) from error
        self.contents = contents
        self.world_size = contents.world_size
        self.origin = contents.origin
        self.unnamed = contents.unnamed
        self.frozen = contents.frozen
        self._state = None
        readers = {(name, kind): tensor for (kind, name), tensor in contents.tensors.items() if not _superseded(contents, kind, name)}
        super().__init__(contents.folder, readers,
                         {key: TensorInfo(*key, tensor.dtype, tensor.shape, (), tuple(_places(tensor))) for key, tensor in readers.items()})
        self.aliases = {alias: name for alias, name in contents.aliases.items() if any((name, kind) in readers for kind in ("fp32", "weight", "buffer"))}

    @property
    def state(self):
        if self._state is None:
            self._state = self._read_state()
        return self._state

    def _read_state(self):
        contents = self.contents
        state = {"client_state": materialise(contents.client_state),
                 "bookkeeping": {"ds_version": contents.version, "ds_config": materialise(contents.config)},
                 "dynamic_loss_scale": bool((contents.loss_scaler or {}).get("dynamic_loss_scale", False))}
        if contents.engine:
            state["counters"] = dict(contents.engine)
        if contents.lr_scheduler is not None:
            state["lr_scheduler"] = materialise(contents.lr_scheduler)
        scaler = _loss_scaler(contents.loss_scaler)
        if scaler is not None:
            state["loss_scaler"] = scaler
        if contents.groups:
            state["optimizer"] = self._optimizer_state()
        return state

    def _optimizer_state(self):
        steps = max(self.contents.steps.values(), default=self.contents.engine.get("global_steps", 0) - self.contents.engine.get("skipped_steps", 0))
        groups = [{"params": list(group["params"]), "values": {key: value for key, value in materialise(group).items() if key not in ("params", "step")}}
                  for group in self.contents.groups]
        return {"class": None, "steps": steps, "missed_steps": {name: steps - taken for name, taken in self.contents.steps.items() if taken < steps},
                "groups": groups}

    def slice_parts(self):
        """DeepSpeed's own optimizers count updates as torch's do."""
        import torch
        return {name: [(0, self._numel(name), {"step": torch.tensor(float(taken))})] for name, taken in self.contents.steps.items()}

    def _numel(self, name):
        return next((self.tensors[name, kind].numel for kind in ("fp32", "weight") if (name, kind) in self.tensors), 0)

    def verify(self):
        problems, seen = [], set()
        for tensor in self.contents.tensors.values():
            for path in tensor.files():
                if path not in seen:
                    seen.add(path)
                    problems += _damage(path)
        return problems


def _superseded(contents, kind, name):
    """A weight that is the rounding of its fp32 master says nothing new."""
    return kind == "weight" and ("fp32", name) in contents.tensors


def _places(tensor):
    for piece in tensor.pieces:
        at = piece.source.storage.offset_bytes + (piece.source.offset + piece.at) * tensor.item_bytes
        yield (piece.source.storage.path.rpartition("/")[2], piece.begin, piece.numel, at)


def _damage(path):
    """What the checksums of a zip file say; older files of torch.save have none."""
    try:
        if not zipfile.is_zipfile(path):
            return []
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
        return [] if bad is None else [f"{path}: the checksum of its entry {bad} is wrong"]
    except (OSError, zipfile.BadZipFile) as error:
        return [f"{path}: {error}"]


def _loss_scaler(saved):
    """As the engine's scaler takes it; None when there was nothing to scale."""
    if not saved or (not saved.get("dynamic_loss_scale") and saved.get("cur_scale", 1.0) == 1.0):
        return None
    if not saved["dynamic_loss_scale"]:
        return {"cur_scale": saved["cur_scale"]}
    return {key: saved[key] for key in ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis") if key in saved}


def materialise(item):
    """`item` with tensors read into torch tensors, and what stood for torch's and Python's small objects as those; containers are new ones."""
    if isinstance(item, TensorRef):
        import torch
        data = item.bytes()
        flat = torch.frombuffer(data, dtype=dtypes.torch_dtype(item.dtype)) if data else torch.empty(0, dtype=dtypes.torch_dtype(item.dtype))
        return flat.reshape(item.shape)
    if isinstance(item, dict):
        result = item.copy()
        for key, value in item.items():
            result[key] = materialise(value)
        return result
    if type(item) in (list, tuple):
        return type(item)(materialise(value) for value in item)
    if isinstance(item, DtypeName):
        return dtypes.torch_dtype(str(item))
    if isinstance(item, DeviceName):
        import torch
        return torch.device(str(item))
    if isinstance(item, Record) and item.kind in _NAMESPACES:
        return _NAMESPACES[item.kind](**{key: materialise(value) for key, value in vars(item).items()})
    return item


_NAMESPACES = {"argparse.Namespace": argparse.Namespace, "types.SimpleNamespace": types.SimpleNamespace}
