# SPDX-License-Identifier: Apache-2.0
"""deepspeed.ops.aio: the same bits come back, whatever the handle's settings; errors say what, where and why."""
import errno
import gc
import os
import subprocess
import sys

import pytest
import torch

from deepspeed.ops import aio
from deepspeed.ops.op_builder import AsyncIOBuilder

HANDLES = {
    "defaults": {},
    "small blocks, one at a time": {"block_size": 4096, "queue_depth": 3, "single_submit": True},
    "overlap": {"block_size": 10000, "queue_depth": 5, "overlap_events": True, "intra_op_parallelism": 3},
}


@pytest.fixture(params=["uring", "threads"])
def engine(request, monkeypatch):
    monkeypatch.setenv("DS_IO_ENGINE", request.param)
    try:
        aio.aio_handle()
    except RuntimeError as error:
        pytest.skip(f"no io_uring here: {error}")
    return request.param


def numbers(n, dtype=torch.int32, seed=0):
    return torch.randint(0, 100, (n,), generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("settings", HANDLES.values(), ids=HANDLES)
@pytest.mark.parametrize("n", [0, 1, 1024, 100003])
def test_what_was_written_is_read(engine, tmp_path, settings, n):
    handle = aio.aio_handle(**settings)
    x = numbers(n)
    path = tmp_path / "x"
    assert handle.sync_pwrite(x, path) == 1
    assert path.read_bytes() == x.numpy().tobytes()
    for read in (lambda y: handle.sync_pread(y, str(path)) == 1, lambda y: handle.read(y, path, True) == 0,
                 lambda y: handle.async_pread(y, path) == 0 and handle.wait() == 1):
        y = torch.full_like(x, -1)
        assert read(y)
        assert torch.equal(x, y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.complex64, torch.int8])
def test_dtypes_and_shapes(tmp_path, dtype):
    handle = aio.aio_handle()
    x = numbers(60, dtype).view(3, 4, 5)
    y = torch.zeros_like(x)
    assert handle.write(x, str(tmp_path / "x"), True) == 0
    handle.read(y, str(tmp_path / "x"), False)
    assert torch.equal(x, y)
    handle.read(scalar := torch.zeros((), dtype=dtype), str(tmp_path / "x"), False)
    assert torch.equal(scalar, x[0, 0, 0])
    parameter = torch.nn.Parameter(torch.zeros(4))
    handle.sync_pwrite(torch.arange(4.0), str(tmp_path / "p"))
    handle.sync_pread(parameter, str(tmp_path / "p"))
    assert parameter.tolist() == [0, 1, 2, 3]


def test_offsets_leave_the_rest_of_the_file(engine, tmp_path):
    handle = aio.aio_handle(block_size=4096)
    path = str(tmp_path / "f")
    whole = numbers(50000, torch.uint8)
    handle.sync_pwrite(whole, path)
    for offset, n in [(0, 100), (4096, 8192), (777, 20000), (49999, 1), (50000, 6000)]:
        piece = numbers(n, torch.uint8, seed=offset)
        handle.sync_pwrite(piece, path, offset)
        if offset == 50000:
            whole = torch.cat([whole, torch.empty(n, dtype=torch.uint8)])
        whole[offset:offset + n] = piece
        got = torch.zeros(n, dtype=torch.uint8)
        handle.sync_pread(got, path, file_offset=offset)
        assert torch.equal(got, piece)
    assert open(path, "rb").read() == whole.numpy().tobytes()


def test_many_under_way(engine, tmp_path):
    handle = aio.aio_handle(block_size=8192, queue_depth=4)
    assert handle.wait() == 0
    tensors = [numbers(20000 + i, seed=i) for i in range(20)]
    for i, x in enumerate(tensors):
        handle.async_pwrite(x.clone(), str(tmp_path / str(i)))   # the handle keeps the copy
    gc.collect()
    assert handle.wait() == 20
    back = [torch.empty_like(x) for x in tensors]
    for i, y in enumerate(back):
        assert handle.pread(y, str(tmp_path / str(i)), True, True) == 0
    assert handle.wait() == 20
    assert all(torch.equal(x, y) for x, y in zip(tensors, back))
    handle.async_pwrite(tensors[0], str(tmp_path / "last"))
    del handle   # waits
    assert (tmp_path / "last").read_bytes() == tensors[0].numpy().tobytes()


def test_write_by_descriptor(tmp_path):
    handle = aio.aio_handle()
    x = numbers(5000)
    with open(tmp_path / "f", "w+b") as file:
        assert handle.async_pwrite(x, file.fileno(), 64) == 0
        assert handle.wait() == 1
        assert file.read() == bytes(64) + x.numpy().tobytes()
    with pytest.raises(OSError, match="file descriptor 999"):
        handle.async_pwrite(x, 999)
    with pytest.raises(ValueError, match="fd must not be negative"):
        handle.async_pwrite(x, -1)


def test_locked_tensors(engine, tmp_path):
    handle = aio.aio_handle()
    x = handle.new_cpu_locked_tensor(3000, torch.empty(0, dtype=torch.float16))
    assert x.shape == (3000,) and x.dtype == torch.float16 and x.data_ptr() % 4096 == 0 and not x.any()
    assert handle.is_pinned(x) and handle.is_pinned(x[100:200]) and not handle.is_pinned(torch.zeros(10))
    x.copy_(numbers(3000, torch.float16))
    handle.sync_pwrite(x, str(tmp_path / "x"))
    y = handle.new_cpu_locked_tensor(3000, x)
    handle.sync_pread(y, str(tmp_path / "x"))
    assert torch.equal(x, y)
    handle.async_pwrite(x, str(tmp_path / "x"))
    assert handle.free_cpu_locked_tensor(x)       # still under way
    assert not handle.free_cpu_locked_tensor(x) and not handle.is_pinned(x)
    assert not handle.free_cpu_locked_tensor(torch.zeros(3))
    assert handle.wait() == 1 and torch.equal(x, y)   # the memory is there as long as a tensor is
    del handle
    assert torch.equal(x, y)
    assert aio.aio_handle().new_cpu_locked_tensor(0, x).shape == (0,)


def test_errors_name_path_and_reason(engine, tmp_path):
    handle = aio.aio_handle()
    x = numbers(5000)
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/none/x") as caught:
        handle.sync_pwrite(x, str(tmp_path / "none" / "x"))
    assert caught.value.errno == errno.ENOENT
    with pytest.raises(FileNotFoundError):
        handle.async_pread(x, str(tmp_path / "absent"))
    with pytest.raises(IsADirectoryError):
        handle.sync_pwrite(x, str(tmp_path))
    with pytest.raises(OSError, match="No space left") as caught:
        handle.sync_pwrite(x, "/dev/full")
    assert caught.value.errno == errno.ENOSPC
    (tmp_path / "short").write_bytes(b"12345")
    before = x.clone()
    with pytest.raises(OSError, match=r"read of 20000 bytes at offset 0 \(the file has 5\) of .*short"):
        handle.sync_pread(x, str(tmp_path / "short"))
    assert torch.equal(x, before)
    assert handle.wait() == 0


def test_bad_arguments_are_named(tmp_path):
    for name, value in [("block_size", 0), ("block_size", 2**31), ("block_size", 2**30 + 1), ("queue_depth", 0), ("queue_depth", -3),
                        ("intra_op_parallelism", 0)]:
        with pytest.raises(ValueError, match=name):
            aio.aio_handle(**{name: value})
    for name, value in [("block_size", "1M"), ("queue_depth", 1.5), ("queue_depth", True), ("single_submit", 1), ("overlap_events", None)]:
        with pytest.raises(TypeError, match=name):
            aio.aio_handle(**{name: value})
    handle, x, path = aio.aio_handle(), torch.zeros(6, 6), str(tmp_path / "f")
    for call, kind, text in [
        (lambda: handle.sync_pwrite([1.0], path), TypeError, "buffer must be a torch.Tensor, got list"),
        (lambda: handle.sync_pwrite(x.t()[1:], path), ValueError, "buffer must be contiguous"),
        (lambda: handle.sync_pwrite(x.to_sparse(), path), ValueError, "buffer must be"),
        (lambda: handle.sync_pwrite(x, 3), TypeError, "filename must be a path, got 3"),
        (lambda: handle.sync_pwrite(x, path, -1), ValueError, "file_offset must not be negative, got -1"),
        (lambda: handle.sync_pwrite(x, path, 1.0), TypeError, "file_offset must be an int"),
        (lambda: handle.pread(x, path, 1, False), TypeError, "validate must be True or False"),
        (lambda: handle.pread(x, path, True, "no"), TypeError, "is_async must be True or False"),
        (lambda: handle.new_cpu_locked_tensor(-1, x), ValueError, "num_elem"),
        (lambda: handle.new_cpu_locked_tensor(1, torch.float32), TypeError, "example_tensor"),
        (lambda: aio.deepspeed_memcpy(x, torch.zeros(3)), ValueError, "dest has 144 bytes and src 12"),
    ]:
        with pytest.raises(kind, match=text):
            call()
    assert not os.path.exists(path)


def test_faults_are_errors_or_right_bits(engine, tmp_path, monkeypatch):
    """DS_IO_FAULTS, with the seam the C++ tests use in thousands of runs (tests/cpp/io/faults_test.cpp)."""
    outcomes = set()
    for seed in range(40):
        monkeypatch.setenv("DS_IO_FAULTS", f"seed={seed},error=0.005,torn=0.005,cut=0.3,again=0.2,delay=0.05,delay_us=20")
        handle = aio.aio_handle(block_size=4096, queue_depth=4, overlap_events=True)
        x, path = numbers(20000, seed=seed), str(tmp_path / "f")
        y = torch.full_like(x, -1)
        try:
            handle.sync_pwrite(x, path)
            assert open(path, "rb").read(x.nbytes) == x.numpy().tobytes()
            handle.sync_pread(y, path)
            assert torch.equal(x, y)
            outcomes.add("right")
        except OSError as error:
            assert error.errno in (errno.EIO, errno.ENOSPC) and path in str(error)
            outcomes.add("error")
    assert outcomes == {"right", "error"}
    monkeypatch.setenv("DS_IO_FAULTS", "eror=1")
    with pytest.raises(ValueError, match="faults: unknown name 'eror'"):
        aio.aio_handle()


def test_the_first_error_comes_after_the_last_operation(engine, tmp_path, monkeypatch):
    monkeypatch.setenv("DS_IO_FAULTS", "seed=1,error=0.3,delay=0.5")
    handle = aio.aio_handle()
    for i in range(12):
        handle.async_pwrite(numbers(2000), str(tmp_path / str(i)))
    with pytest.raises(OSError, match="write of 8000 bytes at offset 0 "):
        handle.wait()
    assert handle.wait() == 0


def test_a_forked_child_neither_hangs_nor_writes(engine, tmp_path):
    script = """
import os, sys
from deepspeed._native import core
handle = core().FileHandle(block_size=4096, queue_depth=4, single_submit=False, overlap_events=True, intra_op_parallelism=1)
x = handle.new_buffer(2**22)
arguments = (sys.argv[1], True, x.address, x.bytes, 0, False)
handle.start(*arguments, x)
child = os.fork()
if child == 0:
    try:
        handle.start(*arguments, x)
    except RuntimeError as error:
        assert "before a fork" in str(error)
        x.unlock()
        del handle, x
        os._exit(7)
    os._exit(1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
assert handle.wait() == 1
handle.run(sys.argv[1], False, x.address, x.bytes, 0, True)
"""
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "f")], timeout=60, capture_output=True, text=True,
                          env={**os.environ, "DS_IO_ENGINE": engine})
    assert done.returncode == 0, done.stderr


def test_module_functions(tmp_path):
    x, path = numbers(3000), str(tmp_path / "f")
    assert aio.aio_write(x, path, 2**20, 8, False, True, True) == 0
    y = torch.zeros_like(x)
    assert aio.aio_read(y, path, 2**20, 8, True, False, False) == 0
    assert torch.equal(x, y)
    z = torch.zeros(12000, dtype=torch.uint8)
    assert aio.deepspeed_memcpy(z, x) == 0
    assert z.numpy().tobytes() == x.numpy().tobytes()


def test_builder():
    builder = AsyncIOBuilder()
    assert builder.is_compatible() and builder.load() is aio
    assert (builder.NAME, builder.BUILD_VAR) == ("async_io", "DS_BUILD_AIO")
    from deepspeed.accelerator import get_accelerator
    assert type(get_accelerator().create_op_builder("AsyncIOBuilder")) is AsyncIOBuilder
    handle = AsyncIOBuilder().load().aio_handle(4096, 7, True, True, 2)
    assert (handle.get_block_size(), handle.get_queue_depth(), handle.get_single_submit(), handle.get_overlap_events(),
            handle.get_intra_op_parallelism(), handle.get_alignment()) == (4096, 7, True, True, 2, 512)
