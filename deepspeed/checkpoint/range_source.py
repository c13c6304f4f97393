# SPDX-License-Identifier: Apache-2.0
"""A CheckpointSource over tensors that can be read by ranges, whatever files they lie in."""
from deepspeed.checkpoint import dtypes
from deepspeed.checkpoint.export.elements import convert
from deepspeed.checkpoint.export.stream import CHUNK_BYTES, chunks
from deepspeed.checkpoint.source import CheckpointError, CheckpointSource, file_error


class RangeSource(CheckpointSource):
    """readers: {(name, kind): object with dtype and read_into(begin, buffer)}; infos: the same keys, TensorInfo."""

    def __init__(self, path, readers, infos):
        self.path, self._readers, self.tensors = path, readers, infos
        self.aliases = {}

    def read_into(self, requests):
        for name, kind, begin, numel, dtype, buffer in requests:
            try:
                _read(self._readers[name, kind], f"{kind} of '{name}'", begin, numel, dtype, memoryview(buffer).cast("B"))
            except OSError as error:
                raise file_error(error, f"{error.filename or self.path}: {error.strerror or error}") from error
            except ValueError as error:
                raise CheckpointError(str(error)) from error

    def verify(self):
        """Such files carry no checksums: what can be told is whether all of it can be read."""
        problems = []
        for tensor in self._readers.values():
            try:
                for _ in chunks(tensor, tensor.dtype):
                    pass
            except (OSError, ValueError) as error:
                problems.append(str(error))
        return problems


def _read(tensor, what, begin, numel, dtype, view):
    if dtype == tensor.dtype:
        tensor.read_into(begin, view)
        return
    if tensor.dtype not in dtypes.CONVERTIBLE or dtype not in dtypes.CONVERTIBLE:
        raise ValueError(f"{what} is {tensor.dtype} and cannot be read as {dtype}")
    size, item = dtypes.item_bytes(dtype), dtypes.item_bytes(tensor.dtype)
    step = CHUNK_BYTES // item
    staging = bytearray(min(step, numel) * item)
    for done in range(0, numel, step):
        count = min(step, numel - done)
        part = memoryview(staging)[:count * item]
        tensor.read_into(begin + done, part)
        view[done * size:(done + count) * size] = convert(part, tensor.dtype, dtype)
