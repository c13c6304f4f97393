# SPDX-License-Identifier: Apache-2.0
"""Weights written for other programs."""
import json
import struct

import numpy
import pytest
import torch

from deepspeed.checkpoint.export import elements
from deepspeed.checkpoint.export.shards import parse_size, plan_shards, write_weights
from deepspeed.checkpoint.export.stream import Instance, Named, Written, write_safetensors, write_torch
from deepspeed.checkpoint.foreign import torch_file
from deepspeed.checkpoint import dtypes

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Held:
    """A torch tensor as the writers take them."""

    def __init__(self, tensor):
        self.tensor = tensor.contiguous()
        self.dtype, self.shape, self.numel = dtypes.name_of(tensor.dtype), tuple(tensor.shape), tensor.numel()
        self.item_bytes = tensor.element_size()

    def read_into(self, begin, buffer):
        view = memoryview(buffer).cast("B")
        view[:] = self.tensor.view(-1).view(torch.uint8).numpy().tobytes()[begin * self.item_bytes:begin * self.item_bytes + len(view)]


class Weights:
    def __init__(self, aliases=None, **tensors):
        self.tensors, self.aliases = {name: Held(tensor) for name, tensor in tensors.items()}, aliases or {}


def read_safetensors(path):
    data = path.read_bytes()
    size, = struct.unpack("<Q", data[:8])
    header = json.loads(data[8:8 + size])
    metadata = header.pop("__metadata__", {})
    found = {}
    for name, entry in header.items():
        part = bytearray(data[8 + size:][slice(*entry["data_offsets"])])
        dtype = dtypes.torch_dtype(entry["dtype"])
        found[name] = (torch.frombuffer(part, dtype=dtype) if part else torch.empty(0, dtype=dtype)).reshape(entry["shape"])
    return found, metadata


def hard_values():
    """Ties in both directions, subnormals, the largest numbers, both zeros, infinities."""
    values = torch.randn(5000, generator=torch.Generator().manual_seed(1)) * 10.0 ** torch.linspace(-44, 38, 5000)
    ties = torch.tensor([0x3F808000, 0x3F818000, 0x3F807FFF, 0x3F808001, 0x7F7FFFFF, 0x00000001, 0x33000000, 0x33000001, 0x477FEFFF, 0x477FF000]).to(torch.int32)
    return torch.cat([values, ties.view(torch.float32), torch.tensor([0.0, -0.0, float("inf"), -float("inf"), 65504.0, 65520.0])])


@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("target", DTYPES)
def test_conversion_is_torchs(source, target):
    values = hard_values().to(DTYPES[source])
    got = elements.convert(values.view(torch.uint8).numpy().tobytes(), source, target)
    wanted = values.to(DTYPES[target])
    assert torch.equal(torch.frombuffer(bytearray(got), dtype=DTYPES[target]), wanted)
    nan = torch.full((3,), float("nan"), dtype=DTYPES[source])
    assert torch.frombuffer(bytearray(elements.convert(nan.view(torch.uint8).numpy().tobytes(), source, target)), dtype=DTYPES[target]).isnan().all()


@pytest.mark.parametrize("text, count", [("5GB", 5 * 10**9), ("1.5 KiB", 1536), ("300", 300), (17, 17), ("2mb", 2 * 10**6), (None, None)])
def test_sizes(text, count):
    assert parse_size(text) == count


@pytest.mark.parametrize("text", ["", "GB", "5 apples", "-1GB", "1e3"])
def test_other_sizes_are_refused(text):
    with pytest.raises(ValueError, match="size"):
        parse_size(text)


def test_shards_keep_order_and_size():
    assert plan_shards({"a": 5, "b": 5, "c": 11, "d": 1, "e": 9}, 10) == [["a", "b"], ["c"], ["d", "e"]]
    assert plan_shards({"a": 5, "b": 5}, None) == [["a", "b"]] and plan_shards({}, 10) == []


def test_dtypes_by_name():
    assert [elements.dtype_named(name) for name in ("bf16", "torch.float16", torch.float32, "F32", None)] == ["BF16", "F16", "F32", "F32", None]
    with pytest.raises(ValueError, match="int8"):
        elements.dtype_named("int8")


@pytest.mark.parametrize("dtype", [None, "BF16"])
@pytest.mark.parametrize("limit, files", [("5GB", 1), (300, 3)])
def test_safetensors_folder(dtype, limit, files, tmp_path):
    tensors = {"a": torch.randn(7, 9), "b": torch.randn(60), "count": torch.arange(5), "scalar": torch.tensor(2.0), "none": torch.empty(0, 4)}
    weights = Weights({"tied": "a"}, **tensors)
    paths = write_weights(weights, tmp_path, dtype, 200 if dtype and files > 1 else limit)
    read, metadata = {}, {}
    for path in map(tmp_path.joinpath, paths):
        found, said = read_safetensors(path)
        read.update(found)
        metadata.update(said)
    assert metadata == {"format": "pt", "tied": "a"}
    wanted = {name: value.to(DTYPES[dtype]) if dtype and value.is_floating_point() else value for name, value in tensors.items()}
    assert set(read) == set(wanted) and all(torch.equal(read[name], wanted[name]) and read[name].dtype == wanted[name].dtype for name in wanted)
    index = tmp_path / "model.safetensors.index.json"
    assert index.exists() == (len(paths) > 1)
    if index.exists():
        said = json.loads(index.read_text())
        assert said["metadata"]["total_size"] == sum(value.numel() * value.element_size() for value in wanted.values())
        assert {name: set(read_safetensors(tmp_path / file)[0]) & {name} for name, file in said["weight_map"].items()} == {name: {name} for name in wanted}


@pytest.mark.parametrize("limit", [None, 300])
def test_torch_folder(limit, tmp_path):
    tensors = {"a": torch.randn(7, 9), "b": torch.randn(60).bfloat16(), "flag": torch.tensor([True, False]), "none": torch.empty(0, 4)}
    paths = write_weights(Weights({"tied": "a"}, **tensors), tmp_path, None, limit, safe=False)
    state = {}
    for path in paths:
        state.update(torch.load(path, mmap=True, weights_only=True))
    assert all(torch.equal(state[name], value) for name, value in tensors.items())
    assert state["tied"].data_ptr() == state["a"].data_ptr()
    if len(paths) > 1:
        assert set(json.loads((tmp_path / "pytorch_model.bin.index.json").read_text())["weight_map"]) == {*tensors, "tied"}


def test_an_index_of_before_does_not_stay(tmp_path):
    weights = Weights(a=torch.randn(60), b=torch.randn(60))
    write_weights(weights, tmp_path, None, 300)
    write_weights(weights, tmp_path, None, "1GB")
    assert not (tmp_path / "model.safetensors.index.json").exists()


def test_larger_than_a_chunk(tmp_path):
    big = torch.randn((16 << 20) // 4 * 2 + 12345)
    write_safetensors(tmp_path / "one.safetensors", {"big": Held(big)}, "BF16")
    assert torch.equal(read_safetensors(tmp_path / "one.safetensors")[0]["big"], big.bfloat16())


def test_objects_of_named_classes(tmp_path):
    scaler = Instance(Named("deepspeed.runtime.fp16.loss_scaler", "LossScaler"), {"cur_scale": 8.0, "dtype": Named("torch", "float16")})
    write_torch(str(tmp_path / "x.pt"), {"scaler": scaler, "again": scaler, "w": Written(Held(torch.ones(2))), "plain": [1, ("a", None)]})
    found = torch_file.load(tmp_path / "x.pt")
    assert vars(found["scaler"]) == {"cur_scale": 8.0, "dtype": "F16"} and found["plain"] == [1, ("a", None)]
    real = torch.load(tmp_path / "x.pt", weights_only=False)
    assert type(real["scaler"]).__name__ == "LossScaler" and real["scaler"].dtype is torch.float16 and real["w"].tolist() == [1.0, 1.0]


def test_a_failed_write_leaves_nothing(tmp_path):
    class Broken(Held):
        def read_into(self, begin, buffer):
            raise OSError("gone")

    for write in (lambda: write_safetensors(tmp_path / "x.safetensors", {"a": Broken(torch.ones(3))}),
                  lambda: write_torch(str(tmp_path / "x.pt"), {"a": Written(Broken(torch.ones(3)))})):
        with pytest.raises(OSError, match="gone"):
            write()
    assert list(tmp_path.iterdir()) == []


def test_whole_numbers_stay():
    data = numpy.arange(5).tobytes()
    assert elements.target_of("I64", "BF16") == "I64" and bytes(elements.convert(data, "I64", "I64")) == data
