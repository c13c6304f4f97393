# SPDX-License-Identifier: Apache-2.0
"""Element types by the names that files use. Imports torch only when asked for torch's own types."""
import functools

# name in a manifest: (bytes, name of the torch dtype)
_TYPES = {
    "F64": (8, "float64"), "F32": (4, "float32"), "F16": (2, "float16"), "BF16": (2, "bfloat16"), "F8_E4M3": (1, "float8_e4m3fn"),
    "F8_E5M2": (1, "float8_e5m2"), "I64": (8, "int64"), "I32": (4, "int32"), "I16": (2, "int16"), "I8": (1, "int8"), "U64": (8, "uint64"),
    "U32": (4, "uint32"), "U16": (2, "uint16"), "U8": (1, "uint8"), "BOOL": (1, "bool"), "C64": (8, "complex64"), "C128": (16, "complex128"),
}
FLOATING = ("F64", "F32", "F16", "BF16")
CONVERTIBLE = ("F32", "F16", "BF16")  # among themselves, while reading
# What the strict safetensors reader knows; others lie in a file as U8.
IN_FILES = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL")


def item_bytes(name):
    """Bytes of one element of the type `name`."""
    return _TYPES[name][0]


@functools.cache
def _torch_types():
    import torch
    return {name: getattr(torch, known) for name, (_, known) in _TYPES.items() if hasattr(torch, known)}


@functools.cache
def _names():
    return {dtype: name for name, dtype in _torch_types().items()}


def torch_dtype(name):
    """The torch dtype of a name."""
    return _torch_types()[name]


def name_of(dtype):
    """The name of a torch dtype. ValueError for those that no file can hold (quantised ones)."""
    try:
        return _names()[dtype]
    except KeyError:
        raise ValueError(f"tensors of {dtype} cannot be saved") from None
