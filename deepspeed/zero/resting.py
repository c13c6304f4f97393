# SPDX-License-Identifier: Apache-2.0
"""States of training put away for a while: their memory is given back to the system, every reference to them stays.

Note [Memory without values]: views of a state are held by C++, by the optimizer object and by callers. So memory is not replaced: on an
accelerator its storage is resized to nothing; on the host its pages are returned to the system and come back, empty, when they are touched.
Pages at the ends, which may belong to others, stay. An accelerator's memory that is not torch's own (the store's, which peers may map), or
that a tensor shares with others, cannot be resized: it stays as it is.
"""
import os
import tempfile

import torch

from deepspeed._native import lib
from deepspeed.telemetry import logger

_CHUNK_BYTES = 64 << 20


def _on_host(tensor):
    return tensor.device.type == "cpu"


def can_be_freed(tensor):
    storage = tensor.untyped_storage()
    return _on_host(tensor) or (storage.resizable() and storage.nbytes() == tensor.numel() * tensor.element_size())


def free_memory(tensor):
    """Frees what a contiguous tensor occupies, and its values with it. On the host this is a request: what the system does not take, stays."""
    if not _on_host(tensor):
        tensor.untyped_storage().resize_(0)
        return
    problem = lib().discard(tensor)
    if problem:
        logger.warning_once(f"offload_states: the system keeps memory of offloaded states: {os.strerror(problem)}")


class HostCopies:
    """Values kept in host memory."""

    def __init__(self, pin_memory, non_blocking):
        self._pin, self._non_blocking = pin_memory, non_blocking
        self._values = []

    def keep(self, tensor):
        copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=self._pin and tensor.device.type == "cuda")
        self._values.append(copy.copy_(tensor, non_blocking=self._non_blocking))

    def give_back(self, tensors, non_blocking):
        for tensor, value in zip(tensors, self._values):
            tensor.copy_(value, non_blocking=non_blocking)

    def drop(self):
        self._values = []


class FileCopies:
    """Values kept in a file without a name: it goes with the process, however that ends."""

    def __init__(self, folder):
        os.makedirs(folder, exist_ok=True)
        self._folder = folder
        self._file = tempfile.TemporaryFile(dir=folder, prefix="offloaded-states-", buffering=0)

    def _parts(self, tensor):
        flat = tensor.view(-1).view(torch.uint8)
        for begin in range(0, flat.numel(), _CHUNK_BYTES):
            yield flat[begin:begin + _CHUNK_BYTES]

    def keep(self, tensor):
        for part in self._parts(tensor):
            view = memoryview(part.cpu().numpy())
            while view:
                try:
                    view = view[self._file.write(view):]
                except OSError as error:
                    raise OSError(error.errno, f"{self._folder}: {error.strerror}: offload_states() has freed nothing") from error

    def give_back(self, tensors, non_blocking):
        self._file.seek(0)
        for tensor in tensors:
            for part in self._parts(tensor):
                staging = part if part.device.type == "cpu" else torch.empty(part.shape, dtype=part.dtype)
                view = memoryview(staging.numpy())
                while view:
                    count = self._file.readinto(view)
                    if not count:
                        raise OSError(f"{self._folder}: the file of the offloaded states ends too early")
                    view = view[count:]
                if staging is not part:
                    part.copy_(staging)

    def drop(self):
        self._file.close()


class RestingStates:
    """What offload_states() has put away, until it is brought back. keep() and bring_back() may fail: then nothing has been freed, and all is as
    far away as before; free() and drop() do not."""

    def __init__(self, valued, empty):
        """Both are (kind, tensor): tensors whose values are kept, and memory whose values count for nothing."""
        self.staying = sorted({kind for kind, tensor in (*valued, *empty) if not can_be_freed(tensor)})
        self._valued, self._empty = ([(tensor, tensor.untyped_storage().nbytes()) for _, tensor in table if can_be_freed(tensor)]
                                     for table in (valued, empty))
        self._copies = None

    def keep(self, copies):
        self._copies = copies
        for tensor, _ in self._valued:
            copies.keep(tensor)
        for device in {tensor.device for tensor, _ in self._valued if tensor.device.type == "cuda"}:
            torch.cuda.current_stream(device).synchronize()

    def free(self):
        for tensor, _ in (*self._valued, *self._empty):
            free_memory(tensor)

    def bring_back(self, non_blocking):
        for tensor, nbytes in (*self._valued, *self._empty):
            if not _on_host(tensor):
                tensor.untyped_storage().resize_(nbytes)
        self._copies.give_back([tensor for tensor, _ in self._valued], non_blocking)

    def drop(self):
        if self._copies is not None:
            self._copies.drop()
        self._valued, self._empty = [], []
