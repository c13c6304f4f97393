# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint is to its readers, whoever wrote it."""
import abc
import errno
from typing import NamedTuple

from deepspeed.checkpoint import dtypes, extent


class CheckpointError(RuntimeError):
    """A checkpoint is not whole, not what was written, or does not fit the model."""


class DamageError(CheckpointError):
    """A checkpoint is not whole, or not what was written: another one may take its place. Whatever else goes wrong would go wrong again."""


_GONE_OR_UNREADABLE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EIO, None)   # None: the file ends too early


def file_error(error, text):
    """The CheckpointError for an OSError. Too many open files, missing rights and the like say nothing about the checkpoint."""
    if error.errno is not None and f"errno {error.errno}" not in text.lower():
        text += f" (errno {error.errno})"
    return (DamageError if error.errno in _GONE_OR_UNREADABLE else CheckpointError)(text)


class TensorInfo(NamedTuple):
    """One tensor of a checkpoint. Elements are counted in row-major order of `shape`, or of its dimensions in `order` (slowest first),
    which is how a parameter with other strides lies in memory."""
    name: str       # of the parameter or buffer
    kind: str       # "fp32" (master), "weight", "buffer", "object", or the name of an optimizer state
    dtype: str      # as safetensors spells it
    shape: tuple
    order: tuple    # () is row-major
    pieces: tuple   # (file, begin, numel, byte offset); for listing only

    numel, nbytes = extent.numel, extent.nbytes


class CheckpointSource(abc.ABC):
    """A checkpoint that can be read: ours (manifest.Checkpoint) or an adapter over another format.

    Attributes:
        path: what was opened, for messages.
        tensors: {(name, kind): TensorInfo}.
        aliases: {other name of a tied parameter: the name it is listed under}.
        state: a dict; every key may be missing:
            "counters": {"global_steps", "global_samples", "micro_steps", "skipped_steps", "gradient_accumulation_steps"}
            "optimizer": {"class": name of the optimizer's class or None (unknown), "steps": updates so far,
                          "missed_steps": {parameter: updates that passed it over},
                          "groups": [{"params": [names], "values": {hyperparameter: value}}]}
            "loss_scaler", "lr_scheduler", "data": their state dicts
            "client_state": what the caller saved
            "extra_state": {module: what its get_extra_state() gave}
            "frozen_excluded": names of parameters that were left out
        world_size: ranks that wrote it; 0: unknown.
    """
    path = ""
    world_size = 0
    tensors = {}
    aliases = {}
    state = {}

    @abc.abstractmethod
    def read_into(self, requests):
        """Fills buffers. requests: [(name, kind, begin, numel, dtype, buffer)], where dtype is that of the tensor or, both being among
        dtypes.CONVERTIBLE, another one to convert to, and buffer a writable contiguous one of numel elements."""

    def check(self, keys=None):
        """CheckpointError unless what the tensors `keys` (all: None) lie in is there and whole as far as can be told without reading it."""

    @abc.abstractmethod
    def verify(self):
        """Reads everything; a list of what is wrong, empty when all is well."""

    def slice_parts(self):
        """{parameter: [(begin, numel, {key: value})]}: what a client's optimizer keeps beside slices, such as torch's "step", by the
        elements it belongs to."""
        return {}

    def random_of(self, rank):
        """What random_state.capture() gave on a rank; None when it was not saved."""
        return None

    def canonical(self, name):
        """The name a parameter is listed under."""
        return self.aliases.get(name, name)

    def read(self, name, kind, begin=0, numel=None, dtype=None):
        """Elements [begin, begin + numel) of a tensor in row-major order, as a 1-D torch tensor on the CPU; all of them, with the tensor's
        shape, when numel is None. `dtype`: a torch dtype to convert to."""
        import torch
        info = self.tensors[name, kind]
        whole = numel is None or bool(info.order)
        first, count = (0, info.numel) if whole else (begin, numel)
        as_stored = dtype is None or info.dtype not in dtypes.CONVERTIBLE or dtypes.name_of(dtype) not in dtypes.CONVERTIBLE
        name_read = info.dtype if as_stored else dtypes.name_of(dtype)
        result = torch.empty(count, dtype=dtypes.torch_dtype(name_read))
        if count:
            self.read_into([(name, kind, first, count, name_read, result.view(torch.uint8).numpy())])
        if dtype is not None:
            result = result.to(dtype)
        if info.order:
            back = sorted(range(len(info.order)), key=info.order.__getitem__)
            result = result.view([info.shape[d] for d in info.order]).permute(back).contiguous().view(-1)
        if numel is None:
            return result.view(info.shape)
        return result[begin:begin + numel] if whole else result
