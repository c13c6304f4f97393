# SPDX-License-Identifier: Apache-2.0
"""Elements from one dtype to another, as bytes. Rounding is to nearest, ties to even, as torch does it."""
import numpy

from deepspeed._native import core

_NATIVE = {"F32": 4, "F16": 2, "BF16": 2}   # what the C++ core converts
_CODES = {"F64": numpy.float64, "F32": numpy.float32, "F16": numpy.float16}
FLOATS = (*_CODES, "BF16")

# Names callers use for an output dtype.
DTYPE_NAMES = {"float32": "F32", "fp32": "F32", "float": "F32", "float16": "F16", "fp16": "F16", "half": "F16", "bfloat16": "BF16", "bf16": "BF16",
               "float64": "F64", "fp64": "F64", "double": "F64"}


def dtype_named(dtype):
    """safetensors' name of a floating-point dtype given as "bf16", "bfloat16", "torch.bfloat16" or torch.bfloat16; None stays None."""
    if dtype is None:
        return None
    text = str(dtype).lower().removeprefix("torch.")
    if text.upper() in FLOATS:
        return text.upper()
    if text not in DTYPE_NAMES:
        raise ValueError(f"dtype {dtype!r} is none of {', '.join(sorted(DTYPE_NAMES))}")
    return DTYPE_NAMES[text]


def target_of(dtype, wanted):
    """What elements stored as `dtype` become when `wanted` is asked for: whole numbers and truth values stay."""
    return wanted if wanted is not None and dtype in FLOATS else dtype


def convert(buffer, source, target):
    """The elements of the byte buffer as a byte buffer of `target`; the same buffer when nothing changes."""
    if source == target:
        return buffer
    if source in _NATIVE and target in _NATIVE:
        view = memoryview(buffer).cast("B")
        result = bytearray(len(view) // _NATIVE[source] * _NATIVE[target])
        core().convert_elements(view, source, result, target)
        return memoryview(result)
    if source == "BF16":
        values = (numpy.frombuffer(buffer, numpy.uint16).astype(numpy.uint32) << 16).view(numpy.float32)
    else:
        values = numpy.frombuffer(buffer, _CODES[source])
    if target == "BF16":
        return _to_bfloat16(values).data.cast("B")
    with numpy.errstate(over="ignore"):
        return numpy.ascontiguousarray(values.astype(_CODES[target])).data.cast("B")


def _to_bfloat16(values):
    with numpy.errstate(over="ignore"):
        bits = values.astype(numpy.float32).view(numpy.uint32)
    rounded = bits + (((bits >> 16) & 1) + numpy.uint32(0x7FFF))   # wraps only for NaNs, replaced below
    result = (rounded >> 16).astype(numpy.uint16)
    nan = (bits & 0x7FFFFFFF) > 0x7F800000
    if nan.any():
        result[nan] = 0x7FC0
    return result
