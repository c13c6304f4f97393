# SPDX-License-Identifier: Apache-2.0
"""Tensors put together from others that are read by ranges: joined, cut, reshaped, converted. Nothing is held, and needs no torch.

A reader is what foreign.tensor_ref.TensorRef is: shape, dtype (safetensors' name), numel, and read_into(begin, buffer), which fills a byte
buffer from element `begin` of the row-major order on.
"""
import numpy

from deepspeed.checkpoint.dtypes import item_bytes
from deepspeed.checkpoint.export.elements import convert

_CHUNK_BYTES = 8 << 20
_SMALL_RUN_BYTES = 256 << 10   # runs below this are read with what lies between them, or row by row into a buffer


def count(shape):
    total = 1
    for extent in shape:
        total *= extent
    return total


class _View:
    def __init__(self, shape, dtype):
        self.shape, self.dtype = tuple(shape), dtype
        self.numel = count(self.shape)
        self.item = item_bytes(dtype)

    def read_into(self, begin, buffer):
        view = memoryview(buffer).cast("B")
        numel = len(view) // self.item
        if begin < 0 or begin + numel > self.numel or numel * self.item != len(view):
            raise ValueError(f"elements [{begin}, {begin + numel}) of a tensor of {self.numel}")
        if numel:
            self._read(begin, numel, view)


class Reshaped(_View):
    def __init__(self, base, shape):
        super().__init__(shape, base.dtype)
        if self.numel != base.numel:
            raise ValueError(f"a tensor of shape {tuple(base.shape)} cannot take the shape {self.shape}")
        self._base = base

    def _read(self, begin, numel, view):
        self._base.read_into(begin, view)


class Cast(_View):
    """`dtype` and the base's are floating-point types that elements.convert knows."""

    def __init__(self, base, dtype):
        super().__init__(base.shape, dtype)
        self._base = base

    def _read(self, begin, numel, view):
        wide = item_bytes(self._base.dtype)
        staging = bytearray(min(numel * wide, _CHUNK_BYTES))
        step = len(staging) // wide
        for done in range(0, numel, step):
            part = memoryview(staging)[:min(step, numel - done) * wide]
            self._base.read_into(begin + done, part)
            values = memoryview(convert(part, self._base.dtype, self.dtype)).cast("B")
            view[done * self.item:done * self.item + len(values)] = values


class _Rows(_View):
    """Read as rows of `_row` elements, one for each index of the dimensions before `dim`."""

    def __init__(self, shape, dtype, dim):
        super().__init__(shape, dtype)
        self._row = count(self.shape[dim:])

    def _read(self, begin, numel, view):
        end = begin + numel
        while begin < end:
            row, first = divmod(begin, self._row)
            rows = (end - begin) // self._row if first == 0 else 0
            if rows > 1 and self._is_small():
                rows = max(1, min(rows, _CHUNK_BYTES // (self._row * self.item)))
                taken = rows * self._row
                self._read_rows(row, rows, view[:taken * self.item])
            else:
                taken = min(self._row - first, end - begin)
                self._read_in_row(row, first, view[:taken * self.item])
            view = view[taken * self.item:]
            begin += taken

    def _elements(self, buffer):
        return numpy.frombuffer(buffer, f"V{self.item}")


class Joined(_Rows):
    """Parts of one dtype along a dimension, as torch.cat joins them."""

    def __init__(self, parts, dim):
        shape = list(parts[0].shape)
        shape[dim] = sum(part.shape[dim] for part in parts)
        super().__init__(shape, parts[0].dtype, dim)
        self._parts = [(part, count(part.shape[dim:])) for part in parts]   # with their elements in a row

    def _is_small(self):
        return min(numel for _, numel in self._parts) * self.item < _SMALL_RUN_BYTES

    def _read_in_row(self, row, first, view):
        for part, numel in self._parts:
            if first >= numel:
                first -= numel
                continue
            taken = min(numel - first, len(view) // self.item)
            part.read_into(row * numel + first, view[:taken * self.item])
            view, first = view[taken * self.item:], 0
            if not view:
                return

    def _read_rows(self, row, rows, view):
        table = self._elements(view).reshape(rows, self._row)
        at = 0
        for part, numel in self._parts:
            staging = bytearray(rows * numel * self.item)
            part.read_into(row * numel, staging)
            table[:, at:at + numel] = self._elements(staging).reshape(rows, numel)
            at += numel


class Narrowed(_Rows):
    """Indices [begin, begin + length) of a dimension."""

    def __init__(self, base, dim, begin, length):
        shape = list(base.shape)
        inner = count(shape[dim + 1:])
        self._base, self._base_row, self._offset = base, shape[dim] * inner, begin * inner
        shape[dim] = length
        super().__init__(shape, base.dtype, dim)

    def _is_small(self):
        return self._row * self.item < _SMALL_RUN_BYTES

    def _read_in_row(self, row, first, view):
        self._base.read_into(row * self._base_row + self._offset + first, view)

    def _read_rows(self, row, rows, view):
        step = max(1, _CHUNK_BYTES // (self._base_row * self.item))
        table = self._elements(view).reshape(rows, self._row)
        for done in range(0, rows, step):
            now = min(step, rows - done)
            staging = bytearray(now * self._base_row * self.item)
            self._base.read_into((row + done) * self._base_row, staging)
            table[done:done + now] = self._elements(staging).reshape(now, self._base_row)[:, self._offset:self._offset + self._row]
