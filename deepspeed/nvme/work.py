# SPDX-License-Identifier: Apache-2.0
"""One measurement: processes that each write or read a file some times. Times are from when all are ready to when the last is done."""
import contextlib
import ctypes
import dataclasses
import multiprocessing
import os
import queue
import time

from deepspeed._native import core

ENGINES = ("aio_handle", "aio_basic", "torch_io", "torch_fastio")
_PATIENCE_S = 600


@dataclasses.dataclass(frozen=True)
class Job:
    """What every process does; sizes in bytes."""
    io_size: int
    read: bool = False
    engine: str = "aio_handle"
    block_size: int = 2**20
    queue_depth: int = 32
    single_submit: bool = False
    overlap_events: bool = True
    intra_op_parallelism: int = 1
    validate: bool = False
    loops: int = 3
    warmup_loops: int = 1
    different_files: bool = False
    fast_io_size: int = 64 * 2**20
    gpu: bool = False
    slow_bounce_buffer: bool = False
    torch_pinned: bool = False
    torch_legacy_save: bool = False

    def handle(self):
        return core().FileHandle(block_size=self.block_size, queue_depth=self.queue_depth, single_submit=self.single_submit,
                                 overlap_events=self.overlap_events, intra_op_parallelism=self.intra_op_parallelism)

    def aio(self):
        """The section `aio` of a configuration with these settings."""
        return {"block_size": self.block_size, "queue_depth": self.queue_depth, "single_submit": self.single_submit,
                "overlap_events": self.overlap_events, "intra_op_parallelism": self.intra_op_parallelism}


class HandleWriter:
    """A file to write to, for torch.save: bytes are collected in one of two buffers while the other is written."""

    def __init__(self, handle, path, buffer_bytes):
        self._handle, self._path, self._bytes = handle, path, max(buffer_bytes // 2, 4096)
        self._buffers = [handle.new_buffer(self._bytes) for _ in range(2)]
        self._filled = self._at = 0
        with open(path, "wb"):
            pass

    def write(self, data):
        data = memoryview(data).cast("B")
        for begin in range(0, len(data), self._bytes):
            self._take(data[begin:begin + self._bytes])
        return len(data)

    def _take(self, piece):
        room = self._bytes - self._filled
        memoryview(self._buffers[0])[self._filled:self._filled + min(room, len(piece))] = piece[:room]
        self._filled += min(room, len(piece))
        if self._filled == self._bytes:
            self._send()
            if len(piece) > room:
                self._take(piece[room:])

    def _send(self):
        self._handle.wait()   # for the other buffer
        if self._filled:
            self._handle.start(self._path, True, self._buffers[0].address, self._filled, self._at, False, self._buffers[0])
        self._at += self._filled
        self._filled = 0
        self._buffers.reverse()

    def flush(self):
        """torch.save calls it; close() is what waits."""

    def close(self):
        self._send()
        self._handle.wait()


class _ByHandle:
    """Engines aio_handle (one handle for all loops) and aio_basic (a new one for each)."""

    def __init__(self, job, device):
        self.job, self.handle, self.device = job, job.handle(), device
        self.memory = None if job.slow_bounce_buffer else self._new_memory()
        self.on_device = _torch().ones(job.io_size, dtype=_torch().uint8, device=device) if device else None

    def _new_memory(self):
        if self.job.torch_pinned:
            return _torch().ones(self.job.io_size, dtype=_torch().uint8).pin_memory()
        memory = self.handle.new_buffer(self.job.io_size)
        ctypes.memset(memory.address, 0x5a, self.job.io_size)
        return memory

    def run(self, path, read):
        memory = self._new_memory() if self.memory is None else self.memory
        handle = self.job.handle() if self.job.engine == "aio_basic" else self.handle
        if self.on_device is not None and not read:
            self._host(memory).copy_(self.on_device)
        address = memory.data_ptr() if self.job.torch_pinned else memory.address
        handle.run(path, not read, address, self.job.io_size, 0, self.job.validate)
        if self.on_device is not None and read:
            self.on_device.copy_(self._host(memory))
        if self.on_device is not None:
            _torch().cuda.synchronize(self.device)

    def _host(self, memory):
        return memory if self.job.torch_pinned else _torch().frombuffer(memory, dtype=_torch().uint8)


class _ByTorch:
    """Engines torch_io (torch.save and torch.load) and torch_fastio (the same through a handle)."""

    def __init__(self, job, device):
        self.job = job
        self.tensor = _torch().ones(job.io_size, dtype=_torch().uint8, device=device or "cpu")
        self.handle = job.handle() if job.engine == "torch_fastio" else None

    def run(self, path, read):
        if read:
            _torch().load(path, map_location=self.tensor.device, weights_only=True)
            return
        legacy = {"_use_new_zipfile_serialization": not self.job.torch_legacy_save}
        if self.handle is None:
            with open(path, "wb") as file:
                _torch().save(self.tensor, file, **legacy)
                file.flush()
                os.fsync(file.fileno())   # the other engines do not leave their bytes in the page cache either
            return
        with contextlib.closing(HandleWriter(self.handle, path, self.job.fast_io_size)) as file:
            _torch().save(self.tensor, file, **legacy)


def _torch():
    import torch
    return torch


def _loops(job, number, folder, device, barrier, say):
    """Runs in a process of its own; tells the seconds of each loop."""
    worker = (_ByTorch if job.engine.startswith("torch") else _ByHandle)(job, device)
    paths = [os.path.join(folder, f"_ds_io_{os.getpid()}_{number}_{i if job.different_files else 0}.bin") for i in range(job.warmup_loops + job.loops)]
    try:
        if job.read:
            for path in sorted(set(paths)):
                worker.run(path, False)
        for loop, path in enumerate(paths):
            barrier.wait(_PATIENCE_S)
            begin = time.perf_counter()
            worker.run(path, job.read)
            barrier.wait(_PATIENCE_S)
            say(("loop", number, loop, time.perf_counter() - begin))
    finally:
        for path in set(paths):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)


def _process(job, number, folder, device, barrier, answers):
    try:
        _loops(job, number, folder, device, barrier, answers.put)
    except Exception as error:   # told in the parent, which ends the others
        barrier.abort()
        answers.put(("error", number, f"{type(error).__name__}: {error}", None))


class _Alone:
    """A barrier for one."""

    def wait(self, timeout):
        pass


def run(job, places, progress=lambda: None):
    """Seconds of each loop, warm-up first. `places`: (folder, device or None) for each process; `progress` is called after each loop."""
    times = {}
    if len(places) == 1:
        def say(answer):
            times[answer[2]] = answer[3]
            progress()
        _loops(job, 0, *places[0], _Alone(), say)
        return [times[i] for i in sorted(times)]
    context = multiprocessing.get_context("spawn")
    barrier, answers = context.Barrier(len(places)), context.Queue()
    processes = [context.Process(target=_process, args=(job, i, *place, barrier, answers), daemon=True) for i, place in enumerate(places)]
    for process in processes:
        process.start()
    try:
        _collect(processes, answers, times, len(places) * (job.warmup_loops + job.loops), progress)
    finally:
        for process in processes:
            process.join(10)
            process.kill()
    return [times[i] for i in sorted(times)]


def _collect(processes, answers, times, expected, progress):
    errors = []
    while expected > 0 and not errors:
        try:
            kind, number, loop, seconds = answers.get(timeout=1)
        except queue.Empty:
            dead = [i for i, process in enumerate(processes) if process.exitcode not in (None, 0)]
            if dead:
                raise RuntimeError(f"process {dead[0]} ended with exit code {processes[dead[0]].exitcode}") from None
            continue
        if kind == "error":
            errors.append((number, loop))
            continue
        times[loop] = max(times.get(loop, 0), seconds)
        expected -= 1
        if number == 0:
            progress()
    if errors:
        with contextlib.suppress(queue.Empty):
            while True:
                kind, number, loop, _ = answers.get(timeout=0.5)
                if kind == "error":
                    errors.append((number, loop))
        number, text = next((e for e in errors if "BrokenBarrier" not in e[1]), errors[0])
        raise RuntimeError(f"process {number}: {text}")
