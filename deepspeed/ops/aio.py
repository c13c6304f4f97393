# SPDX-License-Identifier: Apache-2.0
"""Tensors to files and back, past the page cache and without waiting: io_uring, or threads where the kernel has none.

    handle = aio_handle(block_size=2**20, queue_depth=32)
    weights = handle.new_cpu_locked_tensor(n, torch.empty(0, dtype=torch.float32))
    handle.async_pwrite(weights, "weights.bin")
    ...                                   # weights must stay as they are
    handle.wait()                         # 1; or FileNotFoundError, OSError: no space left, ... with path, range and errno
"""
import os
import weakref

import torch

from deepspeed._native import core

ALIGNMENT = 512  # bytes; what is not a multiple goes through the page cache


def _integer(name, value, least):
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"aio_handle: {name} must be an int, got {value!r}")
    if not least <= value < 2**31:
        raise ValueError(f"aio_handle: {name} must lie in [{least}, 2^31), got {value}")
    return value


def _boolean(name, value):
    if not isinstance(value, bool):
        raise TypeError(f"aio_handle: {name} must be True or False, got {value!r}")
    return value


def _checked_tensor(buffer):
    if not isinstance(buffer, torch.Tensor):
        raise TypeError(f"buffer must be a torch.Tensor, got {type(buffer).__name__}")
    if not buffer.is_contiguous() or buffer.layout != torch.strided:
        raise ValueError(f"buffer must be contiguous, got strides {tuple(buffer.stride())} of shape {tuple(buffer.shape)}"
                         if buffer.layout == torch.strided else f"buffer must be a dense tensor, got {buffer.layout}")
    return buffer


def _checked_file(filename):
    try:
        return os.fspath(filename)
    except TypeError:
        raise TypeError(f"filename must be a path, got {filename!r}") from None


def _checked_offset(file_offset):
    if isinstance(file_offset, bool) or not isinstance(file_offset, int):
        raise TypeError(f"file_offset must be an int, got {file_offset!r}")
    if file_offset < 0:
        raise ValueError(f"file_offset must not be negative, got {file_offset}")
    return file_offset


class aio_handle:  # noqa: N801 (the name users know)
    """Starts reads and writes of whole tensors and waits for them.

    block_size: bytes of one transfer (rounded up to 4096). queue_depth: transfers under way, for each of intra_op_parallelism; with threads
    instead of io_uring there are intra_op_parallelism of them, at least 4. single_submit: a system call for each transfer. overlap_events: begin
    a transfer when any ends, not when all of a queue have. None of them changes what is read or written.

    Tensors must be contiguous. Those of a device are copied through host memory. A write makes the file where there is none and leaves what it
    does not cover; file_offset is in bytes. Errors are OSErrors with path, range and errno. A handle is for one process and not for its forks.
    """

    def __init__(self, block_size=2**20, queue_depth=128, single_submit=False, overlap_events=False, intra_op_parallelism=1):
        self._options = {
            "block_size": _integer("block_size", block_size, 512),
            "queue_depth": _integer("queue_depth", queue_depth, 1),
            "single_submit": _boolean("single_submit", single_submit),
            "overlap_events": _boolean("overlap_events", overlap_events),
            "intra_op_parallelism": _integer("intra_op_parallelism", intra_op_parallelism, 1),
        }
        self._handle = core().FileHandle(**self._options)
        self._locked = weakref.WeakValueDictionary()  # address -> the memory of tensors of new_cpu_locked_tensor
        self._arrivals = []  # (tensor of a device, its bytes on the host), to be copied when the read has ended

    def get_block_size(self):
        return self._options["block_size"]

    def get_queue_depth(self):
        return self._options["queue_depth"]

    def get_single_submit(self):
        return self._options["single_submit"]

    def get_overlap_events(self):
        return self._options["overlap_events"]

    def get_intra_op_parallelism(self):
        return self._options["intra_op_parallelism"]

    def get_alignment(self):
        """Sizes and offsets that are multiples of it (bytes) are what handles of this kind ask for; here any will do."""
        return ALIGNMENT

    # ---- memory

    def new_cpu_locked_tensor(self, num_elem, example_tensor):
        """`num_elem` zeros of example_tensor's dtype in page-aligned memory that stays in RAM as far as the system allows."""
        if isinstance(num_elem, bool) or not isinstance(num_elem, int) or num_elem < 0:
            raise ValueError(f"num_elem must be an int of at least 0, got {num_elem!r}")
        if not isinstance(example_tensor, torch.Tensor):
            raise TypeError(f"example_tensor must be a torch.Tensor, got {type(example_tensor).__name__}")
        dtype = example_tensor.dtype
        if num_elem == 0:
            return torch.empty(0, dtype=dtype)
        memory = self._handle.new_buffer(num_elem * dtype.itemsize)
        self._locked[memory.address] = memory
        return torch.frombuffer(memory, dtype=dtype)

    def free_cpu_locked_tensor(self, tensor):
        """Unlocks such memory, which goes with its last tensor. False: `tensor` is not (or no longer) one of this handle."""
        memory = self._locked.pop(_checked_tensor(tensor).data_ptr(), None)
        if memory is not None:
            memory.unlock()
        return memory is not None

    def is_pinned(self, buffer):
        """Whether the tensor lies in memory that is locked: this handle's, or torch's pinned memory."""
        begin = _checked_tensor(buffer).data_ptr()
        inside = any(address <= begin and begin + buffer.nbytes <= address + memory.bytes for address, memory in list(self._locked.items()))
        return inside or (torch.cuda.is_available() and buffer.is_pinned())

    # ---- transfers

    def _move(self, is_write, buffer, file, validate, is_async, file_offset):
        file_offset = _checked_offset(file_offset)
        host = _checked_tensor(buffer).detach()
        if host.device.type != "cpu":
            host = host.cpu() if is_write else torch.empty_like(host, device="cpu")
        arguments = (file, is_write, host.data_ptr(), host.nbytes, file_offset, _boolean("validate", validate))
        if is_async:
            self._handle.start(*arguments, host)
            if not is_write and host.device != buffer.device:
                self._arrivals.append((buffer, host))
            return
        self._handle.run(*arguments)
        if not is_write and host.device != buffer.device:
            buffer.detach().copy_(host)

    def wait(self):
        """How many operations were started since the last wait; all are over. Throws the first error, after the last one has ended."""
        arrivals, self._arrivals = self._arrivals, []
        count = self._handle.wait()
        for tensor, host in arrivals:
            tensor.detach().copy_(host)
        return count

    def pread(self, buffer, filename, validate, is_async, file_offset=0):
        """Fills `buffer`. `validate`: read once more and compared. 1, or 0 when wait() is to be called."""
        self._move(False, buffer, _checked_file(filename), validate, _boolean("is_async", is_async), file_offset)
        return 0 if is_async else 1

    def pwrite(self, buffer, filename, validate, is_async, file_offset=0):
        """Writes `buffer`. `validate`: read back and compared. 1, or 0 when wait() is to be called."""
        self._move(True, buffer, _checked_file(filename), validate, _boolean("is_async", is_async), file_offset)
        return 0 if is_async else 1

    def sync_pread(self, buffer, filename, file_offset=0):
        return self.pread(buffer, filename, False, False, file_offset)

    def sync_pwrite(self, buffer, filename, file_offset=0):
        return self.pwrite(buffer, filename, False, False, file_offset)

    def async_pread(self, buffer, filename, file_offset=0):
        return self.pread(buffer, filename, False, True, file_offset)

    def async_pwrite(self, buffer, filename, file_offset=0):
        """`filename` may also be a file descriptor opened for writing."""
        file = filename if isinstance(filename, int) and not isinstance(filename, bool) else _checked_file(filename)
        self._move(True, buffer, file, False, True, file_offset)
        return 0

    def read(self, buffer, filename, validate, file_offset=0):
        """As pread, now; 0."""
        self.pread(buffer, filename, validate, False, file_offset)
        return 0

    def write(self, buffer, filename, validate, file_offset=0):
        """As pwrite, now; 0."""
        self.pwrite(buffer, filename, validate, False, file_offset)
        return 0


def aio_read(buffer, filename, block_size, queue_depth, single_submit, overlap_events, validate):
    """Fills `buffer` from the beginning of a file, by a handle of these settings; 0."""
    return aio_handle(block_size, queue_depth, single_submit, overlap_events).read(buffer, filename, validate)


def aio_write(buffer, filename, block_size, queue_depth, single_submit, overlap_events, validate):
    """Writes `buffer` at the beginning of a file, by a handle of these settings; 0."""
    return aio_handle(block_size, queue_depth, single_submit, overlap_events).write(buffer, filename, validate)


def deepspeed_memcpy(dest, src):
    """Copies a tensor's bytes into another one of as many; 0."""
    _checked_tensor(dest), _checked_tensor(src)
    if dest.nbytes != src.nbytes:
        raise ValueError(f"dest has {dest.nbytes} bytes and src {src.nbytes}")
    dest.detach().view(-1).view(torch.uint8).copy_(src.detach().view(-1).view(torch.uint8))
    return 0


class AsyncIOBuilder:
    """Finds the operations above; nothing is built when they are first used."""
    NAME = "async_io"
    BUILD_VAR = "DS_BUILD_AIO"

    def absolute_name(self):
        return "deepspeed.ops.aio"

    def is_compatible(self, verbose=False):
        return True

    def load(self, verbose=True):
        import deepspeed.ops.aio
        return deepspeed.ops.aio
