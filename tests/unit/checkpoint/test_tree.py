# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint holds besides tensors of the model: written as JSON and read back the same, type for type; nothing hostile gets further
than an error."""
import argparse
import base64
import collections
import datetime
import decimal
import fractions
import json
import math
import pathlib
import pickle
import types
import uuid

import numpy
import pytest
import torch

from deepspeed.checkpoint import tree


class Box:
    """Where encode() puts large values."""

    def __init__(self):
        self.held = {}

    def put(self, tensor, path):
        assert tensor.dim() == 1 and tensor.device.type == "cpu"
        name = f"{len(self.held)}/{path}"
        self.held[name] = tensor.clone()
        return name

    def encode(self, value):
        return json.loads(json.dumps(tree.Encoder(self.put).encode(value), allow_nan=False))

    def round_trip(self, value):
        return tree.decode(self.encode(value), self.held.__getitem__)


def same(a, b):
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and a.contiguous().view(-1).view(torch.uint8).tolist() == b.contiguous().view(-1).view(torch.uint8).tolist()
    if isinstance(a, (numpy.ndarray, numpy.generic)):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, float):
        return math.copysign(1, a) == math.copysign(1, b) and (a == b or a != a and b != b)
    if isinstance(a, complex):
        return same(a.real, b.real) and same(a.imag, b.imag)
    if isinstance(a, dict):
        extras = getattr(a, "default_factory", None) is getattr(b, "default_factory", None)
        return extras and len(a) == len(b) and all(same(k, l) and same(v, w) for (k, v), (l, w) in zip(a.items(), b.items()))
    if isinstance(a, (list, tuple, collections.deque)):
        return len(a) == len(b) and getattr(a, "maxlen", None) == getattr(b, "maxlen", None) and all(map(same, a, b))
    if isinstance(a, (types.SimpleNamespace, argparse.Namespace)):
        return same(vars(a), vars(b))
    return a == b


VALUES = {
    "plain": [None, True, 0, -2**70, 1.5, "text ü", [], {}, {"a": [1, {"b": None}]}],
    "float": [math.nan, math.inf, -math.inf, -0.0, 5e-324],
    "str": ["\ud800 alone", "a\0b"],
    "dict": [{1: "a", "b": 2, None: 3, (1, 2): 4}, {"$": "float", "value": "nan"}, {"ü": 1}, {"$": 1}],
    "OrderedDict": [collections.OrderedDict([("z", 1), ("a", 2)])],
    "Counter": [collections.Counter("abca")],
    "defaultdict": [collections.defaultdict(list, {"a": [1]}), collections.defaultdict(None, {1: 2}), collections.defaultdict(dict)],
    "deque": [collections.deque([1, (2,)], maxlen=5), collections.deque()],
    "tuple": [(), (1, (2, [3]))],
    "set": [{1, "a", (2, 3)}, set()],
    "frozenset": [frozenset([1, frozenset([2])])],
    "bytes": [b"", b"\0\xff", bytes(range(256)) * 3],
    "bytearray": [bytearray(b"ab"), bytearray(1000)],
    "complex": [1 - 2j, complex(-0.0, math.inf), complex(math.nan, 1)],
    "range": [range(3), range(10, -4, -3)],
    "slice": [slice(1, None, "x")],
    "datetime": [datetime.datetime(2026, 1, 2, 3, 4, 5, 6), datetime.datetime(2026, 1, 2, tzinfo=datetime.timezone.utc)],
    "date": [datetime.date(1, 1, 1)],
    "time": [datetime.time(23, 59, 59, 999999)],
    "timedelta": [datetime.timedelta(-3, 5, 7)],
    "Decimal": [decimal.Decimal("1.10"), decimal.Decimal("-Infinity")],
    "UUID": [uuid.UUID(int=7)],
    "path": [pathlib.PurePosixPath("a/b"), pathlib.Path("/ü")],
    "namespace": [types.SimpleNamespace(a=1, b=(2,))],
    "argparse.Namespace": [argparse.Namespace(lr=0.1, names={"x"})],
    "tensor": [torch.arange(3), torch.tensor(1.5), torch.empty(0, 4), torch.arange(300.0).reshape(3, 100).t(), torch.ones(40, dtype=torch.bfloat16),
               torch.tensor([True]), torch.tensor([1 + 2j]).conj(), torch.tensor([[1 + 2j]], dtype=torch.complex128), torch.ones(100, dtype=torch.uint16)],
    "numpy.ndarray": [numpy.arange(6).reshape(2, 3), numpy.zeros((0, 2), "<f4"), numpy.asfortranarray(numpy.ones((30, 20))), numpy.array(["ab", "c"]),
                      numpy.array(3.0), numpy.arange(3, dtype=">i4")],
    "numpy.scalar": [numpy.float32(1.25), numpy.int64(-7), numpy.bool_(True), numpy.complex64(1j)],
    "torch.Size": [torch.Size([2, 3]), torch.Size([])],
    "torch.dtype": [torch.bfloat16, torch.int64],
    "torch.device": [torch.device("cpu"), torch.device("cuda:1")],
}


@pytest.mark.parametrize("tag", VALUES)
def test_values_come_back_the_same(tag):
    for value in VALUES[tag]:
        box = Box()
        encoded = box.encode(value)
        if tag not in ("plain", "float", "str", "path"):
            assert encoded["$"] == tag, value
        back = tree.decode(encoded, box.held.__getitem__)
        expected = value.resolve_conj() if isinstance(value, torch.Tensor) else value
        assert same(back, pathlib.Path(expected) if isinstance(expected, pathlib.PurePath) else expected), (value, back)
    box = Box()
    whole = {"inside": [VALUES[tag], tuple(VALUES[tag][:1])]}
    assert list(box.round_trip(whole)) == ["inside"]


def test_every_tag_has_its_round_trip():
    assert set(tree._DECODERS) - set(VALUES) == {"pickle"}


def test_what_is_read_may_be_written_to():
    box = Box()
    for value in (torch.arange(3), torch.arange(100), numpy.arange(3), numpy.arange(100), bytearray(3), bytearray(100)):
        back = box.round_trip(value)
        back[0] = 1
        assert back[0] == 1


def test_large_values_go_to_the_file_and_small_ones_stay():
    box = Box()
    box.encode({"small": torch.zeros(16), "bytes": bytes(64)})
    assert not box.held
    box.encode({"large": torch.zeros(17), "list": [bytes(65)]})
    assert list(box.held) == ["0/state.large", "1/state.list[0]"]


def test_an_unknown_class_is_pickled_and_not_trusted():
    box = Box()
    encoded = box.encode({"a": Box(), "b": fractions.Fraction(1, 3)})
    assert encoded["a"]["$"] == "pickle" and encoded["a"]["class"] == f"{__name__}.Box"
    back = tree.decode(encoded, box.held.__getitem__)
    assert back["b"] == fractions.Fraction(1, 3)   # known to do no harm
    with pytest.raises(RuntimeError, match="test_tree.Box.*not read.*allow_classes"):
        back["a"].held


@pytest.mark.parametrize("value, reason", [(lambda: 1, r"state\.a.*function"), (types.ModuleType("m"), r"state\.a.*module")])
def test_what_cannot_be_held_is_named_by_its_path(value, reason):
    with pytest.raises(ValueError, match=reason):
        Box().encode({"a": value})


def nested(depth, wrap):
    value = 1
    for _ in range(depth):
        value = wrap(value)
    return value


@pytest.mark.parametrize("wrap", [lambda v: [v], lambda v: {"k": v}, lambda v: (v,), lambda v: {1: v}, lambda v: types.SimpleNamespace(k=v)])
def test_depth_has_an_end(wrap):
    box = Box()
    assert same(box.round_trip(nested(100, wrap)), nested(100, wrap))
    with pytest.raises(ValueError, match="nested deeper than 100 levels"):
        box.encode(nested(102, wrap))


def test_what_contains_itself_is_refused():
    loop = []
    loop.append(loop)
    with pytest.raises(ValueError, match="contains itself"):
        Box().encode({"a": loop})


HOSTILE = [
    {"$": "no such tag"}, {"$": None}, {"$": []}, {"$": {}}, {"$": 1}, {"$": "__class__"}, {"$": "tuple"}, {"$": "tuple", "items": 5},
    {"$": "dict", "pairs": [[1]]}, {"$": "dict", "pairs": [[[1], 2]]}, {"$": "set", "items": [[1]]}, {"$": "bytes", "data": "not base64!"},
    {"$": "bytes", "object": "nowhere"}, {"$": "float", "value": "abc"}, {"$": "float", "value": None}, {"$": "defaultdict", "factory": "eval", "pairs": []},
    {"$": "deque", "items": [1], "maxlen": -1}, {"$": "range", "items": [0, 1, 0]}, {"$": "range", "items": []}, {"$": "slice", "items": [1, 2, 3, 4]},
    {"$": "complex", "value": ["a", "b"]}, {"$": "datetime", "value": "yesterday"}, {"$": "date", "value": 7}, {"$": "timedelta", "items": [10**400, 0, 0]},
    {"$": "Decimal", "value": "x"}, {"$": "UUID", "value": "x"}, {"$": "path", "value": 3}, {"$": "namespace", "values": [[1, 2]]},
    {"$": "tensor", "dtype": "F32", "shape": [3], "data": "AAAA"}, {"$": "tensor", "dtype": "nothing", "shape": [], "data": ""},
    {"$": "tensor", "dtype": "F32", "shape": [2**62, 2**62], "data": ""},
    {"$": "tensor", "dtype": "F32", "shape": ["a"], "data": "AAAAAA=="}, {"$": "numpy.ndarray", "dtype": "O", "shape": [1], "data": "AAAAAAAAAAA="},
    {"$": "numpy.ndarray", "dtype": "<f4", "shape": [2**62], "data": ""}, {"$": "numpy.ndarray", "dtype": {"names": 1}, "shape": [], "data": ""},
    {"$": "torch.Size", "items": ["a"]}, {"$": "torch.dtype", "name": "load"}, {"$": "torch.dtype", "name": "__class__"},
    {"$": "torch.device", "name": "../etc"}, {"$": "str", "data": "////"}, {"$": "pickle", "data": "!"},
]


@pytest.mark.parametrize("value", HOSTILE, ids=str)
def test_hostile_input_is_an_error_of_the_kinds_a_reader_expects(value):
    box = Box()
    with pytest.raises((ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, ArithmeticError, RecursionError, RuntimeError)):
        tree.decode({"a": [value]}, box.held.__getitem__)


def test_a_hostile_pickle_runs_nothing(tmp_path):
    class Evil:
        def __reduce__(self):
            return (exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",))

    box = Box()
    encoded = {"$": "pickle", "class": "x.Evil", "data": base64.b64encode(pickle.dumps(Evil(), protocol=4)).decode()}
    stand_in = tree.decode(encoded, box.held.__getitem__)
    with pytest.raises(RuntimeError, match="x.Evil was not read.*builtins.exec"):
        stand_in.anything
    assert not (tmp_path / "ran").exists()


def test_depth_of_hostile_input_is_an_error():
    value = nested(100_000, lambda v: [v])
    with pytest.raises(RecursionError):
        tree.decode(value, {}.__getitem__)
