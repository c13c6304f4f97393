# SPDX-License-Identifier: Apache-2.0
"""What is different in two checkpoints, whoever wrote them and with however many ranks. Holds one chunk of each."""
from typing import NamedTuple

import numpy

from deepspeed.checkpoint.export.elements import FLOATS, convert
from deepspeed.checkpoint.export.stream import CHUNK_BYTES
from deepspeed.checkpoint.export.weights import SourceTensor


class Difference(NamedTuple):
    name: str
    kind: str
    what: str


def differences(first, second, progress=None):
    """[Difference] between two sources, in the order of the first; tensors of the same values in different dtypes differ by dtype alone."""
    found = []
    keys = list(first.tensors) + [key for key in second.tensors if key not in first.tensors]
    for name, kind in keys:
        if kind == "object":
            continue
        one, other = first.tensors.get((name, kind)), second.tensors.get((name, kind))
        if one is None or other is None:
            found.append(Difference(name, kind, f"only in {(second if one is None else first).path}"))
        elif tuple(one.shape) != tuple(other.shape):
            found.append(Difference(name, kind, f"shape {list(one.shape)} and {list(other.shape)}"))
        else:
            what = _values(SourceTensor(first, one), SourceTensor(second, other), progress)
            if what:
                found.append(Difference(name, kind, what))
    return found


def compared_bytes(first, second):
    """How many bytes of the first differences() will read."""
    return sum(info.nbytes for key, info in first.tensors.items() if key in second.tensors and key[1] != "object" and info.shape == second.tensors[key].shape)


def _values(one, other, progress):
    """In words how the elements differ; empty when they do not."""
    counted, largest = 0, 0.0
    step = CHUNK_BYTES // max(one.item_bytes, other.item_bytes)
    for begin in range(0, one.numel, step):
        count = min(step, one.numel - begin)
        parts = []
        for tensor in (one, other):
            parts.append(bytearray(count * tensor.item_bytes))
            tensor.read_into(begin, parts[-1])
        if progress is not None:
            progress(count * one.item_bytes)
        if one.dtype == other.dtype and parts[0] == parts[1]:
            continue
        if one.dtype in FLOATS and other.dtype in FLOATS:
            values = [numpy.frombuffer(convert(part, tensor.dtype, "F64"), numpy.float64) for part, tensor in zip(parts, (one, other))]
            with numpy.errstate(invalid="ignore"):
                unequal = (values[0] != values[1]) & ~(numpy.isnan(values[0]) & numpy.isnan(values[1]))
                apart = numpy.abs(values[0] - values[1])[unequal]
            counted += int(unequal.sum())
            largest = max(largest, float(numpy.nanmax(apart))) if apart.size and not numpy.isnan(apart).all() else largest
        else:
            counted += count if one.dtype != other.dtype else int((numpy.frombuffer(parts[0], numpy.uint8) != numpy.frombuffer(parts[1], numpy.uint8))
                                                                   .reshape(count, -1).any(axis=1).sum())
    words = [] if one.dtype == other.dtype else [f"dtype {one.dtype} and {other.dtype}"]
    if counted:
        words.append(f"{counted} of {one.numel} elements, by {largest:.3g} at most" if one.dtype in FLOATS else f"{counted} of {one.numel} elements")
    return ", ".join(words)
