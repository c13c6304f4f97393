# SPDX-License-Identifier: Apache-2.0
"""A pickle reader that builds data and runs nothing.

Note [What a pickle may name]: a pickle is a program that can import and call anything. This reader looks every name up in a table of
those that checkpoints of DeepSpeed contain, and what stands in the table is not the thing itself but a harmless one of ours: tensors become
TensorRef (which file, which bytes), DeepSpeed's objects become Record (their attributes). Any other name is refused by that name. Callers who trust
a file's further names say so as they do to torch: torch.serialization.add_safe_globals([...]).
"""
import collections
import pickle
import sys

from deepspeed.checkpoint.foreign import arrays
from deepspeed.checkpoint.foreign.tensor_ref import DTYPES, StorageRef, TensorRef


class UnsafePickleError(pickle.UnpicklingError, ValueError):
    """A pickle names what may not be loaded."""


class Record:
    """The attributes of an object whose class is known and is not needed."""

    kind = ""

    def __new__(cls, *args, **kwargs):
        return object.__new__(cls)

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        parts = state if isinstance(state, tuple) else (state,)
        for part in parts:
            if isinstance(part, dict):
                self.__dict__.update((str(key), value) for key, value in part.items())

    def __repr__(self):
        return f"{self.kind}({', '.join(f'{key}={value!r}' for key, value in self.__dict__.items())})"


def _record(kind):
    return type(kind.rpartition(".")[2], (Record,), {"kind": kind})


class DtypeName(str):
    """A torch dtype by its safetensors name."""


class DeviceName(str):
    """A torch device by its name."""


def _device(*where):
    return DeviceName(":".join(map(str, where)))


def _rebuild_tensor(storage, offset, size, stride, *_rest):
    """Also the dtype that newer torch gives last: the storage is untyped then."""
    return TensorRef(storage, offset, size, stride)


def _rebuild_tensor_v3(storage, offset, size, stride, requires_grad, backward_hooks, dtype, *_rest):
    if not isinstance(dtype, DtypeName):
        raise pickle.UnpicklingError(f"a tensor's dtype is a {type(dtype).__name__}")
    return TensorRef(storage.viewed_as(str(dtype)), offset, size, stride)


def _rebuild_parameter(data, *_rest):
    return data


def _rebuild_from_type(function, kind, arguments, state):
    if function not in _REBUILDERS:
        raise pickle.UnpicklingError("a tensor is built by an unknown function")
    return function(*arguments)


_REBUILDERS = (_rebuild_tensor, _rebuild_tensor_v3, _rebuild_parameter)


def _reconstructor(kind, base, state):
    if not (isinstance(kind, type) and issubclass(kind, Record)) or base is not object:
        raise pickle.UnpicklingError("copyreg._reconstructor for a class that is not a known record")
    return kind()


def _encode(text, encoding="latin1"):
    if encoding not in ("latin1", "latin-1", "utf-8", "ascii"):
        raise pickle.UnpicklingError(f"encoding {encoding!r}")
    return text.encode(encoding)


_RECORDS = (
    *(f"deepspeed.runtime.fp16.loss_scaler.{name}" for name in ("LossScaler", "DynamicLossScaler", "LossScaleConfig", "LossScaleProfile", "LossScalerBase")),
    "deepspeed.utils.tensor_fragment.fragment_address",
    "deepspeed.utils.tensor_fragment.tensor_fragment",
    "deepspeed.checkpoint.universal_checkpoint.SubparamShape",
    "types.SimpleNamespace",
    "argparse.Namespace",
)

# torch.float32 and its like, pickled by name; storage classes of older files carry the dtype.
_STORAGES = {"FloatStorage": "F32", "DoubleStorage": "F64", "HalfStorage": "F16", "BFloat16Storage": "BF16", "ByteStorage": "U8", "CharStorage": "I8",
             "ShortStorage": "I16", "IntStorage": "I32", "LongStorage": "I64", "BoolStorage": "BOOL"}

_TABLE = {
    **{name: _record(name) for name in _RECORDS},
    "deepspeed.runtime.zero.config.ZeroStageEnum": int,
    "collections.OrderedDict": collections.OrderedDict,
    "collections.defaultdict": collections.defaultdict,
    "collections.Counter": collections.Counter,
    **{f"builtins.{kind.__name__}": kind for kind in (dict, list, tuple, set, frozenset, int, float, complex, bool, str, bytes, bytearray, slice, range, object)},
    **{f"__builtin__.{name}": kind for name, kind in (("dict", dict), ("list", list), ("tuple", tuple), ("set", set), ("frozenset", frozenset), ("int", int),
                                                      ("long", int), ("float", float), ("complex", complex), ("bool", bool), ("unicode", str),
                                                      ("bytearray", bytearray), ("slice", slice), ("object", object))},
    "copyreg._reconstructor": _reconstructor,
    "copy_reg._reconstructor": _reconstructor,
    "_codecs.encode": _encode,
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": _rebuild_tensor_v3,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch._utils._rebuild_parameter_with_state": _rebuild_parameter,
    "torch._tensor._rebuild_from_type": _rebuild_from_type,
    "torch._tensor._rebuild_from_type_v2": _rebuild_from_type,
    "torch.Tensor": _record("torch.Tensor"),
    "torch.nn.parameter.Parameter": _record("torch.nn.parameter.Parameter"),
    "torch.Size": tuple,
    "torch.device": _device,
    **{f"torch.{name}": DtypeName(code) for name, code in DTYPES.items()},
    **{f"torch.{name}": DtypeName(code) for name, code in _STORAGES.items()},
    "torch.storage.UntypedStorage": DtypeName("U8"),
    **{f"{package}.multiarray.scalar": arrays.scalar for package in ("numpy.core", "numpy._core")},
    **{f"{package}.multiarray._reconstruct": arrays.Array.begin for package in ("numpy.core", "numpy._core")},
    "numpy.dtype": arrays.ElementType,
    "numpy.ndarray": arrays.Array,
}


def _trusted(full_name):
    """What the caller has told torch to admit."""
    torch = sys.modules.get("torch")
    if torch is None:
        return None
    for entry in torch.serialization.get_safe_globals():
        thing, name = entry if isinstance(entry, tuple) else (entry, f"{getattr(entry, '__module__', '')}.{getattr(entry, '__qualname__', '')}")
        if name == full_name:
            return thing
    return None


class Unpickler(pickle.Unpickler):
    """Reads one pickle of the file `path`; `storage_at(key, dtype, numel)` tells where a storage's bytes lie."""

    def __init__(self, file, path, storage_at):
        super().__init__(file, encoding="utf-8")
        self._path, self._storage_at = path, storage_at
        self._storages = {}

    def find_class(self, module, name):
        full_name = f"{module}.{name}"
        thing = _TABLE.get(full_name)
        if thing is None:
            thing = _trusted(full_name)
        if thing is None:
            raise UnsafePickleError(
                f"{self._path}: holds a {full_name}, which is not among the names known from DeepSpeed's checkpoints; loading it could run code of the "
                f"file's author. If you trust the file: torch.serialization.add_safe_globals([{full_name}])")
        return thing

    def persistent_load(self, entry):
        if not (isinstance(entry, tuple) and len(entry) >= 5 and entry[0] == "storage" and isinstance(entry[1], DtypeName)):
            raise pickle.UnpicklingError(f"{self._path}: a reference to something that is no storage")
        _, dtype, key, _, numel, *view = entry
        if not isinstance(numel, int) or numel < 0:
            raise pickle.UnpicklingError(f"{self._path}: a storage of {numel!r} elements")
        if any(part is not None for part in view):
            raise pickle.UnpicklingError(f"{self._path}: a view of a storage, as torch before 0.4 wrote them")
        if key not in self._storages:
            self._storages[key] = self._storage_at(key, str(dtype), numel)
        return self._storages[key]


def settle(item):
    """`item` with numpy arrays finished; containers keep their type."""
    if isinstance(item, arrays.Array):
        return item.finish()
    if isinstance(item, dict):
        for key in list(item):
            item[key] = settle(item[key])
    elif isinstance(item, list):
        item[:] = [settle(value) for value in item]
    elif type(item) is tuple:
        return tuple(settle(value) for value in item)
    elif isinstance(item, Record):
        settle(item.__dict__)
    return item


__all__ = ["Record", "StorageRef", "TensorRef", "UnsafePickleError", "Unpickler", "settle"]
