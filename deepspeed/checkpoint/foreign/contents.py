# SPDX-License-Identifier: Apache-2.0
"""What a foreign checkpoint holds, as tensors of (kind, parameter name) made of pieces in files, and the plain values beside them.

Kinds are those of our own format: "weight" (as stored), "fp32" (master), "buffer", and one per optimizer state ("exp_avg", ...).
"""
from typing import NamedTuple

from deepspeed.checkpoint import extent


class ForeignCheckpointError(ValueError):
    """A checkpoint that cannot be read, with the file or parameter that is the reason."""


class Piece(NamedTuple):
    """Elements [begin, begin + numel) of a tensor are elements [at, at + numel) of `source`."""
    begin: int
    numel: int
    source: object
    at: int


class ForeignTensor:

    def __init__(self, kind, name, dtype, shape, pieces):
        self.kind, self.name, self.dtype, self.shape = kind, name, dtype, tuple(shape)
        self.pieces = sorted((piece for piece in pieces if piece.numel), key=lambda piece: piece.begin)
        end = 0
        for piece in self.pieces:
            if piece.begin != end:
                raise ForeignCheckpointError(f"{kind} of '{name}': elements from {min(piece.begin, end)} on are stored twice or not at all")
            if piece.source.dtype != dtype:
                raise ForeignCheckpointError(f"{kind} of '{name}': parts are stored as {piece.source.dtype} and as {dtype}")
            end += piece.numel
        if end != self.numel:
            raise ForeignCheckpointError(f"{kind} of '{name}': {end} elements are stored, its shape {list(self.shape)} has {self.numel}")

    numel, item_bytes, nbytes = extent.numel, extent.item_bytes, extent.nbytes

    def read_into(self, begin, buffer):
        """Fills the writable byte buffer with elements from `begin` on, in row-major order and the stored dtype."""
        view = memoryview(buffer).cast("B")
        end = begin + len(view) // self.item_bytes
        for piece in self.pieces:
            low, high = max(begin, piece.begin), min(end, piece.begin + piece.numel)
            if low < high:
                piece.source.read_into(piece.at + low - piece.begin, view[(low - begin) * self.item_bytes:(high - begin) * self.item_bytes])

    def files(self):
        return sorted({piece.source.storage.path for piece in self.pieces})


def whole(kind, name, reference):
    """A tensor that lies in one place."""
    return ForeignTensor(kind, name, reference.dtype, reference.shape, [Piece(0, reference.numel, reference, 0)])


class Contents:
    """Everything a foreign folder holds."""

    def __init__(self, folder):
        self.folder = folder
        self.origin = ""         # who wrote it, in words
        self.version = None
        self.stage = None
        self.world_size = 1
        self.tensors = {}        # (kind, name) -> ForeignTensor
        self.aliases = {}        # tied name -> the name its tensors are stored under
        self.frozen = set()      # names of weights that were not trained
        self.groups = []         # hyperparameters of each group; "params": names
        self.steps = {}          # name -> optimizer steps taken
        self.engine = {}         # global_steps, global_samples, skipped_steps
        self.loss_scaler = None
        self.lr_scheduler = None
        self.data_sampler = None
        self.random_ltd = None
        self.config = None
        self.client_state = {}
        self.unnamed = None      # why optimizer states could not be given to parameters

    def add(self, tensor):
        self.tensors[tensor.kind, tensor.name] = tensor

    def names(self, kind):
        return [name for found, name in self.tensors if found == kind]
