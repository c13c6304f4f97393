# SPDX-License-Identifier: Apache-2.0
"""Python values as JSON and back: what a checkpoint holds besides the model's tensors.

A value that JSON has by itself stands for itself. Everything else is an object {"$": tag, ...}; the tags are those of _DECODERS,
written down in docs/checkpoint_format.md. Larger tensors and bytes go through `put`, which returns the name they can be read by.
Values of classes that no tag covers are pickled, each by itself, with a warning; they are read by restricted_pickle.
"""
import argparse
import base64
import collections
import datetime
import decimal
import math
import pathlib
import pickle
import types
import uuid

from deepspeed.checkpoint import dtypes, restricted_pickle
from deepspeed.telemetry import logger

_INLINE_BYTES = 64
_DEPTH = 100   # reading takes four frames a level, and Python has a thousand
_FACTORIES = {"list": list, "dict": dict, "set": set, "int": int, "float": float, "str": str, "tuple": tuple, "bool": bool}


def _b64(data):
    return base64.b64encode(data).decode("ascii")


class Encoder:
    """encode(value) -> JSON value. put(tensor, path) -> name stores a 1-D CPU tensor and says how to find it again."""

    def __init__(self, put):
        self.put = put

    def encode(self, value, path="state", depth=0):
        if value is None or type(value) in (bool, int):
            return value
        if depth > _DEPTH:
            raise ValueError(f"{path[:200]}...: nested deeper than {_DEPTH} levels, or it contains itself")
        kind = type(value)
        if kind is str:
            return self._text(value)
        if kind is float:
            return value if math.isfinite(value) else {"$": "float", "value": repr(value)}
        if kind is list:
            return [self.encode(item, f"{path}[{i}]", depth + 1) for i, item in enumerate(value)]
        if kind is dict and "$" not in value and all(type(key) is str and key.isascii() for key in value):
            return {key: self.encode(item, f"{path}.{key}", depth + 1) for key, item in value.items()}
        found = _ENCODERS.get(kind)
        if found is not None:
            return found(self, value, path, depth)
        return self._other(value, path, depth)

    def items(self, value, path, depth):
        return [self.encode(item, f"{path}[{i}]", depth + 1) for i, item in enumerate(value)]

    def pairs(self, value, path, depth):
        return [[self.encode(key, f"{path}.key", depth + 1), self.encode(item, f"{path}[{key!r}]", depth + 1)] for key, item in value.items()]

    @staticmethod
    def _text(value):
        try:
            value.encode()
        except UnicodeEncodeError:
            return {"$": "str", "data": _b64(value.encode("utf-8", "surrogatepass"))}
        return value

    def bytes(self, value, path, tag):
        if len(value) <= _INLINE_BYTES:
            return {"$": tag, "data": _b64(value)}
        import torch
        return {"$": tag, "object": self.put(torch.frombuffer(bytearray(value), dtype=torch.uint8), path)}

    def tensor(self, value, path, tag="tensor"):
        import torch
        plain = value.detach()
        if plain.layout is not torch.strided or plain.is_quantized or type(plain) is not torch.Tensor or plain.is_meta:
            return self.pickled(value, path)
        plain = plain.cpu().contiguous().resolve_conj().resolve_neg()
        row = {"$": tag, "dtype": dtypes.name_of(plain.dtype), "shape": list(plain.shape)}
        flat = plain.reshape(-1)
        if flat.numel() * flat.element_size() <= _INLINE_BYTES:
            return {**row, "data": _b64(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")}
        return {**row, "object": self.put(flat, path)}

    def _other(self, value, path, depth):
        import numpy
        import torch
        if isinstance(value, torch.Tensor):
            return self.tensor(value.data if type(value) is torch.nn.Parameter else value, path)
        if type(value) is torch.Size:
            return {"$": "torch.Size", "items": list(value)}
        if isinstance(value, torch.dtype):
            return {"$": "torch.dtype", "name": str(value).removeprefix("torch.")}
        if isinstance(value, torch.device):
            return {"$": "torch.device", "name": str(value)}
        if isinstance(value, (numpy.generic, numpy.ndarray)) and type(value).__module__ == "numpy" and value.dtype.kind in "biufcSU":
            tag = "numpy.ndarray" if isinstance(value, numpy.ndarray) else "numpy.scalar"
            held = self.bytes(numpy.ascontiguousarray(value).tobytes(), path, tag)
            return {**held, "dtype": value.dtype.str, "shape": list(value.shape)}
        if isinstance(value, pathlib.PurePath):
            return {"$": "path", "value": self._text(str(value))}
        return self.pickled(value, path)

    def pickled(self, value, path):
        kind = type(value)
        name = f"{kind.__module__}.{kind.__qualname__}"
        try:
            data = pickle.dumps(value, protocol=4)
        except Exception as error:
            raise ValueError(f"{path} is a {name}, which a checkpoint cannot hold: {error}") from error
        logger.warning(f"checkpoint: {path} is a {name} and is pickled; whoever loads it must trust the class "
                       "(deepspeed.checkpoint.allow_classes)")
        return {**self.bytes(data, path, "pickle"), "class": name}


def _defaultdict(encoder, value, path, depth):
    factory = getattr(value.default_factory, "__name__", None)
    if value.default_factory is not None and _FACTORIES.get(factory) is not value.default_factory:
        return encoder.pickled(value, path)
    return {"$": "defaultdict", "factory": factory, "pairs": encoder.pairs(value, path, depth)}


def _namespace(encoder, value, path, depth):
    tag = "argparse.Namespace" if type(value) is argparse.Namespace else "namespace"
    return {"$": tag, "values": encoder.pairs(vars(value), path, depth)}


_ENCODERS = {
    dict: lambda e, v, p, d: {"$": "dict", "pairs": e.pairs(v, p, d)},
    collections.OrderedDict: lambda e, v, p, d: {"$": "OrderedDict", "pairs": e.pairs(v, p, d)},
    collections.Counter: lambda e, v, p, d: {"$": "Counter", "pairs": e.pairs(v, p, d)},
    collections.defaultdict: _defaultdict,
    collections.deque: lambda e, v, p, d: {"$": "deque", "items": e.items(v, p, d), "maxlen": v.maxlen},
    tuple: lambda e, v, p, d: {"$": "tuple", "items": e.items(v, p, d)},
    set: lambda e, v, p, d: {"$": "set", "items": e.items(v, p, d)},
    frozenset: lambda e, v, p, d: {"$": "frozenset", "items": e.items(v, p, d)},
    bytes: lambda e, v, p, d: e.bytes(v, p, "bytes"),
    bytearray: lambda e, v, p, d: e.bytes(v, p, "bytearray"),
    complex: lambda e, v, p, d: {"$": "complex", "value": [repr(v.real), repr(v.imag)]},
    range: lambda e, v, p, d: {"$": "range", "items": [v.start, v.stop, v.step]},
    slice: lambda e, v, p, d: {"$": "slice", "items": e.items((v.start, v.stop, v.step), p, d)},
    datetime.datetime: lambda e, v, p, d: {"$": "datetime", "value": v.isoformat()} if v.tzinfo in (None, datetime.timezone.utc)
    else e.pickled(v, p),
    datetime.date: lambda e, v, p, d: {"$": "date", "value": v.isoformat()},
    datetime.time: lambda e, v, p, d: {"$": "time", "value": v.isoformat()} if v.tzinfo is None else e.pickled(v, p),
    datetime.timedelta: lambda e, v, p, d: {"$": "timedelta", "items": [v.days, v.seconds, v.microseconds]},
    decimal.Decimal: lambda e, v, p, d: {"$": "Decimal", "value": str(v)},
    uuid.UUID: lambda e, v, p, d: {"$": "UUID", "value": str(v)},
    types.SimpleNamespace: _namespace,
    argparse.Namespace: _namespace,
}


# ---- back


class _Decoder:

    def __init__(self, fetch):
        self.fetch = fetch

    def __call__(self, value):
        if isinstance(value, list):
            return [self(item) for item in value]
        if not isinstance(value, dict):
            return value
        if "$" not in value:
            return {key: self(item) for key, item in value.items()}
        try:
            decoder = _DECODERS[value["$"]]
        except (KeyError, TypeError):
            raise ValueError(f"a value has the unknown tag {value['$']!r}: it was written by a newer version") from None
        return decoder(self, value)

    def items(self, value):
        return [self(item) for item in value["items"]]

    def pairs(self, value, key="pairs"):
        return [(self(name), self(item)) for name, item in value[key]]

    def bytes(self, value):
        if "data" in value:
            return base64.b64decode(value["data"], validate=True)
        return self.fetch(value["object"]).numpy().tobytes()

    def tensor(self, value):
        import torch
        dtype = dtypes.torch_dtype(value["dtype"])
        if "object" in value:
            return self.fetch(value["object"]).view(dtype).reshape(value["shape"])
        data = self.bytes(value)
        flat = torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)
        return flat.reshape(value["shape"])

    def array(self, value):
        import numpy
        dtype = numpy.dtype(value["dtype"])
        if dtype.hasobject:
            raise ValueError("an array of objects cannot be read")
        array = numpy.frombuffer(bytearray(self.bytes(value)), dtype=dtype).reshape(value["shape"])
        return array if value["$"] == "numpy.ndarray" else array[()]


def _torch_dtype(decoder, value):
    import torch
    found = getattr(torch, value["name"], None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"torch has no dtype {value['name']!r}")
    return found


def _torch(name, read):
    def decode(decoder, value):
        import torch
        return getattr(torch, name)(read(value))
    return decode


_DECODERS = {
    "float": lambda d, v: float(v["value"]),
    "str": lambda d, v: base64.b64decode(v["data"], validate=True).decode("utf-8", "surrogatepass"),
    "dict": lambda d, v: dict(d.pairs(v)),
    "OrderedDict": lambda d, v: collections.OrderedDict(d.pairs(v)),
    "Counter": lambda d, v: collections.Counter(dict(d.pairs(v))),
    "defaultdict": lambda d, v: collections.defaultdict(_FACTORIES[v["factory"]] if v["factory"] else None, d.pairs(v)),
    "deque": lambda d, v: collections.deque(d.items(v), v["maxlen"]),
    "tuple": lambda d, v: tuple(d.items(v)),
    "set": lambda d, v: set(d.items(v)),
    "frozenset": lambda d, v: frozenset(d.items(v)),
    "bytes": lambda d, v: d.bytes(v),
    "bytearray": lambda d, v: bytearray(d.bytes(v)),
    "complex": lambda d, v: complex(*(float(part) for part in v["value"])),
    "range": lambda d, v: range(*v["items"]),
    "slice": lambda d, v: slice(*d.items(v)),
    "datetime": lambda d, v: datetime.datetime.fromisoformat(v["value"]),
    "date": lambda d, v: datetime.date.fromisoformat(v["value"]),
    "time": lambda d, v: datetime.time.fromisoformat(v["value"]),
    "timedelta": lambda d, v: datetime.timedelta(*v["items"]),
    "Decimal": lambda d, v: decimal.Decimal(v["value"]),
    "UUID": lambda d, v: uuid.UUID(v["value"]),
    "path": lambda d, v: pathlib.Path(d(v["value"])),
    "namespace": lambda d, v: types.SimpleNamespace(**dict(d.pairs(v, "values"))),
    "argparse.Namespace": lambda d, v: argparse.Namespace(**dict(d.pairs(v, "values"))),
    "tensor": lambda d, v: d.tensor(v),
    "numpy.ndarray": lambda d, v: d.array(v),
    "numpy.scalar": lambda d, v: d.array(v),
    "torch.Size": _torch("Size", lambda v: v["items"]),
    "torch.device": _torch("device", lambda v: v["name"]),
    "torch.dtype": _torch_dtype,
    "pickle": lambda d, v: restricted_pickle.loads(d.bytes(v), v.get("class", "")),
}


def decode(value, fetch):
    """The value of which `value` is the encoding. fetch(name) -> the tensor that `put` had named so."""
    return _Decoder(fetch)(value)
