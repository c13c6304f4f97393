# SPDX-License-Identifier: Apache-2.0
"""Reading torch's pickled files without running them."""
import argparse
import builtins
import collections
import io
import os
import pickle
import zipfile

import numpy
import pytest
import torch

from deepspeed.checkpoint.foreign import torch_file
from deepspeed.checkpoint.foreign.adapter import materialise
from deepspeed.checkpoint.foreign.tensor_ref import TensorRef
from deepspeed.checkpoint.foreign.unpickle import Record, UnsafePickleError


class Calls:
    """Pickles to a call of `function`."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


class Unknown:
    """Some class of a training script."""

    def __init__(self):
        self.value = 3


def saved(item, path, zipped=True):
    torch.save(item, path, _use_new_zipfile_serialization=zipped)
    return path


@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_and_values_come_back(zipped, tmp_path):
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    item = {"plain": base, "view": base[1:3, 2:5], "turned": base.t(), "none": torch.empty(0, 3), "scalar": torch.tensor(2.5),
            "kinds": [torch.ones(3, dtype=dtype) for dtype in (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16,
                                                               torch.int8, torch.uint8, torch.bool)],
            "parameter": torch.nn.Parameter(base[0].clone()), "more": collections.OrderedDict(a=(1, 2.5, None, True), b={3: b"x", "s": {1, 2}}),
            "count": collections.Counter("aab"), "device": torch.device("cpu"), "dtype": torch.bfloat16, "args": argparse.Namespace(lr=0.1), "size": torch.Size((2, 3)), "complex": 1 + 2j,
            "array": numpy.arange(6, dtype=numpy.int16).reshape(2, 3).T, "number": numpy.float64(0.5)}
    found = torch_file.load(saved(item, tmp_path / "file.pt", zipped))
    read = materialise(found)
    for name in ("plain", "view", "turned", "none", "scalar", "parameter"):
        assert isinstance(found[name], TensorRef) and torch.equal(read[name], item[name].data) and read[name].dtype == item[name].dtype, name
    assert all(torch.equal(one, other) and one.dtype == other.dtype for one, other in zip(read["kinds"], item["kinds"]))
    assert read["more"] == item["more"] and type(read["more"]) is collections.OrderedDict and read["count"] == item["count"]
    assert read["device"] == torch.device("cpu") and read["dtype"] is torch.bfloat16 and read["args"] == argparse.Namespace(lr=0.1) and read["size"] == (2, 3) and read["complex"] == 1 + 2j
    assert numpy.array_equal(read["array"], item["array"]) and read["array"].dtype == numpy.int16 and read["number"] == 0.5
    part = bytearray(8)
    found["turned"].read_into(5, part)
    assert numpy.frombuffer(part, numpy.float32).tolist() == item["turned"].reshape(-1)[5:7].tolist()


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("function, name", [(os.system, "system"), (builtins.eval, "eval"), (builtins.getattr, "getattr"), (builtins.__import__, "__import__"),
                                            (pickle.loads, "loads"), (torch.load, "load"), (torch.storage._load_from_bytes, "_load_from_bytes"),
                                            (io.open, "open"), (numpy.load, "load")])
def test_calls_are_refused_by_name(function, name, zipped, tmp_path):
    path = saved({"module": {}, "epoch": Calls(function, "touch " + str(tmp_path / "ran"))}, tmp_path / "file.pt", zipped)
    with pytest.raises(UnsafePickleError, match=rf"file\.pt: holds a [\w.]*\b{name},"):
        torch_file.load(path)
    assert not (tmp_path / "ran").exists()


def test_classes_of_a_script_need_the_callers_trust(tmp_path):
    path = saved({"args": Unknown()}, tmp_path / "file.pt")
    with pytest.raises(UnsafePickleError, match=r"Unknown.*add_safe_globals"):
        torch_file.load(path)
    with torch.serialization.safe_globals([Unknown]):
        assert torch_file.load(path)["args"].value == 3
    with pytest.raises(UnsafePickleError):
        torch_file.load(path)


def pickled_file(path, text, storages=()):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("a/data.pkl", text)
        for key, data in storages:
            archive.writestr(f"a/data/{key}", data)
        archive.writestr("a/version", b"3\n")
    return path


def tensor_pickle(numel=4, size=(4,), stride=(1,), offset=0, dtype="FloatStorage", key="0"):
    def ints(values):
        return b"(" + b"".join(b"L%dL\n" % value for value in values) + b"t"
    return (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\n" + dtype.encode() + b"\nX\x01\x00\x00\x00" + key.encode() +
            b"X\x03\x00\x00\x00cpuL%dL\ntQL%dL\n" % (numel, offset) + ints(size) + ints(stride) + b"\x89ccollections\nOrderedDict\n)RtR.")


def test_the_tricks_below_start_from_what_works(tmp_path):
    path = pickled_file(tmp_path / "file.pt", tensor_pickle(), [("0", bytes(16))])
    assert materialise(torch_file.load(path)).tolist() == [0.0] * 4 and torch.load(path, weights_only=False).tolist() == [0.0] * 4


@pytest.mark.parametrize("trick", [dict(numel=5), dict(numel=-1), dict(size=(5,)), dict(size=(2, 2), stride=(4, 1)), dict(offset=1), dict(offset=-1),
                                   dict(size=(-4,)), dict(stride=(-1,)), dict(size=(2, 2)), dict(numel=2**62), dict(size=(2**40, 2**40), stride=(1, 1)),
                                   dict(key="1"), dict(dtype="QuantStorage")])
def test_tensors_that_reach_outside_are_refused(trick, tmp_path):
    path = pickled_file(tmp_path / "file.pt", tensor_pickle(**trick), [("0", bytes(16))])
    with pytest.raises(ValueError, match=r"file\.pt"):
        torch_file.load(path)


def test_only_plain_zip_entries_are_read(tmp_path):
    with zipfile.ZipFile(tmp_path / "file.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", tensor_pickle())
        archive.writestr("a/data/0", bytes(16))
    with pytest.raises(torch_file.TorchFileError, match="compressed"):
        torch_file.load(tmp_path / "file.pt")
    with zipfile.ZipFile(tmp_path / "big.pt", "w") as archive:
        archive.writestr("a/data.pkl", tensor_pickle())
        archive.writestr("a/data/0", bytes(16))
        archive.writestr("a/byteorder", b"big")
    with pytest.raises(torch_file.TorchFileError, match="big-endian"):
        torch_file.load(tmp_path / "big.pt")


@pytest.mark.parametrize("data", [b"", b"PK", b"PK\3\4", b"\x80\x02.", b"garbage", b"\x80\x02K\x01.", b"(" * 100000, b"\x80\x04\x95" + b"\xff" * 8])
def test_other_files_are_refused(data, tmp_path):
    (tmp_path / "file.pt").write_bytes(data)
    with pytest.raises(ValueError, match=r"file\.pt"):
        torch_file.load(tmp_path / "file.pt")


@pytest.mark.parametrize("item", [
    numpy.array([{}], dtype=object), numpy.zeros(2, dtype=[("a", "i4")]), numpy.array(["2020-01-01"], dtype="M8[D]"),
])
def test_arrays_of_other_than_plain_elements_are_refused(item, tmp_path):
    with pytest.raises(ValueError, match=r"file\.pt"):
        torch_file.load(saved({"item": item}, tmp_path / "file.pt"))


def test_objects_of_deepspeed_become_records(tmp_path):
    text = (b"\x80\x02cdeepspeed.runtime.fp16.loss_scaler\nLossScaler\n)\x81}X\x09\x00\x00\x00cur_scaleG@P\x00\x00\x00\x00\x00\x00sb.")
    found = torch_file.load(pickled_file(tmp_path / "file.pt", text))
    assert isinstance(found, Record) and found.kind.endswith("LossScaler") and found.cur_scale == 64.0
