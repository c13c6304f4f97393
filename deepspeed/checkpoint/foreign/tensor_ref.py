# SPDX-License-Identifier: Apache-2.0
"""Where a tensor's bytes lie in a file: read by ranges, nothing held. Needs no torch."""
import os

import numpy

from deepspeed.checkpoint import extent

# torch's name -> safetensors' name
DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8",
          "uint8": "U8", "bool": "BOOL", "uint16": "U16", "uint32": "U32", "uint64": "U64", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
          "complex64": "C64"}
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1, "U16": 2, "U32": 4, "U64": 8,
              "F8_E4M3": 1, "F8_E5M2": 1, "C64": 8}
_RAW = {1: numpy.uint8, 2: numpy.uint16, 4: numpy.uint32, 8: numpy.uint64}


class StorageRef:
    """`numel` elements of `dtype` from byte `offset_bytes` of the file `path`."""

    __slots__ = ("path", "offset_bytes", "dtype", "numel")

    def __init__(self, path, offset_bytes, dtype, numel):
        self.path, self.offset_bytes, self.dtype, self.numel = path, offset_bytes, dtype, numel

    nbytes = extent.nbytes

    def viewed_as(self, dtype):
        return StorageRef(self.path, self.offset_bytes, dtype, self.nbytes // ITEM_BYTES[dtype])

    def read_into(self, begin, buffer):
        """Fills the writable byte buffer from element `begin` on."""
        with open(self.path, "rb", buffering=0) as file:
            read_exactly(file.fileno(), self.offset_bytes + begin * ITEM_BYTES[self.dtype], buffer, self.path)


class TensorRef:
    """A tensor in a file: `shape`, `dtype` (safetensors' name), and its elements by ranges of the row-major order."""

    __slots__ = ("storage", "offset", "shape", "stride")

    def __init__(self, storage, offset, shape, stride):
        shape, stride = tuple(shape), tuple(stride)
        if not isinstance(storage, StorageRef):
            raise ValueError("a tensor without a storage")
        if len(shape) != len(stride) or any(not isinstance(n, int) or n < 0 for n in (offset, *shape, *stride)):
            raise ValueError(f"{storage.path}: a tensor of shape {shape}, stride {stride}, offset {offset}")
        self.storage, self.offset, self.shape, self.stride = storage, offset, shape, stride
        if self.numel and offset + self._span() > storage.numel:
            raise ValueError(f"{storage.path}: a tensor of shape {shape}, stride {stride}, offset {offset} reaches past its storage of {storage.numel} elements")

    def _span(self):
        return 1 + sum((extent - 1) * step for extent, step in zip(self.shape, self.stride))

    @property
    def dtype(self):
        return self.storage.dtype

    numel, item_bytes = extent.numel, extent.item_bytes

    def is_contiguous(self):
        expected = 1
        for extent, step in zip(reversed(self.shape), reversed(self.stride)):
            if extent != 1 and step != expected:
                return False
            expected *= extent
        return True

    def same_bytes(self, other):
        """Whether both are the same elements of one storage: a tied weight."""
        return (self.storage is other.storage and self.offset == other.offset and self.shape == other.shape and self.stride == other.stride)

    def read_into(self, begin, buffer):
        """Fills the writable byte buffer (a whole number of elements) from element `begin` of the row-major order on."""
        view = memoryview(buffer).cast("B")
        count = len(view) // self.item_bytes
        if begin < 0 or begin + count > self.numel or count * self.item_bytes != len(view):
            raise ValueError(f"{self.storage.path}: elements [{begin}, {begin + count}) of a tensor of {self.numel}")
        if not count:
            return
        if self.is_contiguous():
            self.storage.read_into(self.offset + begin, view)
            return
        raw = numpy.empty(self._span(), _RAW[self.item_bytes])
        self.storage.read_into(self.offset, raw.data.cast("B"))
        whole = numpy.lib.stride_tricks.as_strided(raw, self.shape, [step * self.item_bytes for step in self.stride], writeable=False)
        numpy.copyto(numpy.frombuffer(view, raw.dtype), whole.reshape(-1)[begin:begin + count])

    def bytes(self):
        data = bytearray(self.numel * self.item_bytes)
        self.read_into(0, data)
        return data

    def item(self):
        """The only element, as a Python number."""
        if self.numel != 1:
            raise ValueError(f"{self.storage.path}: a number was expected, found a tensor of shape {self.shape}")
        data = bytes(self.bytes())
        if self.dtype == "BF16":
            return float(numpy.frombuffer(b"\0\0" + data, numpy.float32)[0])
        code = {"F64": "f8", "F32": "f4", "F16": "f2", "I64": "i8", "I32": "i4", "I16": "i2", "I8": "i1", "U8": "u1", "BOOL": "?"}[self.dtype]
        return numpy.frombuffer(data, code)[0].item()

    def __repr__(self):
        return f"TensorRef({self.dtype}, {list(self.shape)}, {os.path.basename(self.storage.path)})"


def read_exactly(descriptor, offset, buffer, path):
    """Fills `buffer` with the bytes of the file from `offset` on; an error names the file when it ends before."""
    view = memoryview(buffer).cast("B")
    done = 0
    while done < len(view):
        count = os.preadv(descriptor, [view[done:]], offset + done)
        if count == 0:
            raise ValueError(f"{path}: the file ends at byte {offset + done}, expected were {len(view) - done} more")
        done += count
