# SPDX-License-Identifier: Apache-2.0
"""numpy scalars and arrays in pickles, rebuilt from their bytes without numpy's own unpickling (which trusts what it reads)."""
import pickle

import numpy


class ElementType:
    """A pickled numpy.dtype of plain elements."""

    def __init__(self, text, align=False, copy=True):
        self._text, self._order = text, "="

    def __setstate__(self, state):
        # (version, byte order, subdtype, field names, fields, ...)
        if len(state) < 5 or any(part is not None for part in state[2:5]):
            raise pickle.UnpicklingError("a numpy array of records")
        self._order = state[1]

    def dtype(self):
        if not isinstance(self._text, str) or self._text[:1] not in "biufcSU" or self._order not in ("=", "<", ">", "|"):
            raise pickle.UnpicklingError(f"a numpy array of elements {self._text!r}")
        return numpy.dtype(self._text).newbyteorder(self._order)


def scalar(kind, data=b""):
    dtype = kind.dtype()
    if not isinstance(data, bytes) or len(data) != dtype.itemsize:
        raise pickle.UnpicklingError("a numpy scalar of wrong size")
    return numpy.frombuffer(data, dtype)[0]


class Array:
    """A pickled numpy.ndarray; `finish()` makes the array."""

    @staticmethod
    def begin(kind, shape, code):
        return Array()

    def __setstate__(self, state):
        _, self._shape, self._kind, self._fortran, self._data = state

    def finish(self):
        dtype = self._kind.dtype()
        shape = tuple(self._shape)
        size = dtype.itemsize
        for extent in shape:
            if not isinstance(extent, int) or extent < 0:
                raise pickle.UnpicklingError("a numpy array of a negative extent")
            size *= extent
        if not isinstance(self._data, bytes) or len(self._data) != size:
            raise pickle.UnpicklingError("a numpy array of wrong size")
        return numpy.frombuffer(self._data, dtype).reshape(shape, order="F" if self._fortran else "C").copy()
