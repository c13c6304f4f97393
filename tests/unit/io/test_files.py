# SPDX-License-Identifier: Apache-2.0
"""The Python face of csrc/io and csrc/platform; their own behaviour is tested in tests/cpp."""
import errno
import json
import os
import struct

import numpy as np
import pytest

from deepspeed import _native

core = _native.core()


def save(path, **arrays):
    names = {np.dtype("float32"): "F32", np.dtype("int64"): "I64", np.dtype("uint8"): "U8"}
    core.save_safetensors(str(path), {key: (names[a.dtype], list(a.shape), a) for key, a in arrays.items()}, {"made_by": "test"})


def test_round_trip(tmp_path):
    w, ids, empty = np.random.rand(33, 7).astype("float32"), np.arange(5), np.zeros((0, 3), dtype="uint8")
    save(tmp_path / "t", w=w, ids=ids, empty=empty)
    reader = core.SafetensorsReader(str(tmp_path / "t"))
    assert reader.metadata == {"made_by": "test"}
    assert reader.tensors == {"ids": ("I64", [5]), "w": ("F32", [33, 7]), "empty": ("U8", [0, 3])}
    back = np.empty_like(w)
    reader.read("w", back)
    assert (back == w).all()
    reader.read("empty", np.empty_like(empty))


def test_the_file_is_what_the_format_says(tmp_path):
    """Read without our reader: length, JSON, then the bytes."""
    w = np.arange(6, dtype="float32")
    save(tmp_path / "t", w=w)
    blob = (tmp_path / "t").read_bytes()
    size, = struct.unpack("<Q", blob[:8])
    header = json.loads(blob[8:8 + size])
    begin, end = header["w"]["data_offsets"]
    assert header["w"]["dtype"] == "F32" and header["w"]["shape"] == [6]
    assert np.frombuffer(blob[8 + size + begin:8 + size + end], "float32").tolist() == w.tolist()
    assert (8 + size + begin) % 4096 == 0


def test_buffers_are_checked(tmp_path):
    w = np.zeros((4, 4), dtype="float32")
    save(tmp_path / "t", w=w)
    reader = core.SafetensorsReader(str(tmp_path / "t"))
    with pytest.raises(ValueError, match="has 60 bytes, needed are 64"):
        reader.read("w", np.zeros(15, dtype="float32"))
    with pytest.raises(ValueError, match="not contiguous"):
        reader.read("w", np.zeros((4, 8), dtype="float32")[:, ::2])
    with pytest.raises(ValueError, match="no tensor 'v'"):
        reader.read("v", w)
    frozen = np.zeros(16, dtype="float32")
    frozen.flags.writeable = False
    with pytest.raises((ValueError, BufferError)):
        reader.read("w", frozen)
    with pytest.raises(ValueError, match="unknown dtype 'F31'"):
        core.save_safetensors(str(tmp_path / "u"), {"w": ("F31", [4, 4], w)})


def test_errors_are_os_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent"):
        core.SafetensorsReader(str(tmp_path / "absent"))
    (tmp_path / "bad").write_bytes(b"\xff" * 20)
    with pytest.raises(RuntimeError, match="bad is not a valid safetensors file: HeaderTooLarge"):
        core.SafetensorsReader(str(tmp_path / "bad"))
    if os.geteuid() != 0:
        with pytest.raises(PermissionError) as caught:
            save("/t", w=np.zeros(1, dtype="float32"))
        assert caught.value.errno == errno.EACCES


def test_platform_facts():
    assert core.available_cores() == len(os.sched_getaffinity(0))
    assert core.cpu_model_name()
    assert core.io_engine_name() in ("io_uring", "threads")
    assert all(isinstance(name, str) for name in core.cpu_features())
    assert {name for name, _, _ in core.environment_table()} >= {"RANK", "DS_IO_ENGINE"}
