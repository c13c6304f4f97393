# SPDX-License-Identifier: Apache-2.0
"""Files written tensor by tensor, in chunks: safetensors, and the zip files of torch.save. Each appears under its name when it is whole and durable.

A tensor to be written is anything with `dtype` (safetensors' name), `shape`, `numel`, `item_bytes` and `read_into(begin, buffer)`.
"""
import collections
import contextlib
import io
import json
import os
import pickle
import struct
import zipfile

from deepspeed.checkpoint.export.elements import convert, target_of
from deepspeed.checkpoint.foreign.tensor_ref import ITEM_BYTES

CHUNK_BYTES = 16 << 20


@contextlib.contextmanager
def whole_file(path):
    """A binary file that becomes `path` at the end of the block, made durable; after an error there is nothing."""
    part = f"{path}.part-{os.getpid()}"
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(part)
        raise


def chunks(tensor, dtype):
    """The tensor's elements as byte buffers of `dtype`."""
    step = max(1, CHUNK_BYTES // tensor.item_bytes)
    buffer = bytearray(min(step, tensor.numel) * tensor.item_bytes)
    for begin in range(0, tensor.numel, step):
        view = memoryview(buffer)[:min(step, tensor.numel - begin) * tensor.item_bytes]
        tensor.read_into(begin, view)
        yield convert(view, tensor.dtype, dtype)


def nbytes(tensor, dtype=None):
    """Size of the tensor when written with floats as `dtype`."""
    return tensor.numel * ITEM_BYTES[target_of(tensor.dtype, dtype)]


def write_safetensors(path, tensors, dtype=None, metadata=None, progress=None):
    """{name: tensor} into one file; floats become `dtype`. progress(bytes) is called as they are written."""
    header, end = ({"__metadata__": dict(metadata)} if metadata else {}), 0
    for name, tensor in tensors.items():
        begin, end = end, end + nbytes(tensor, dtype)
        header[name] = {"dtype": target_of(tensor.dtype, dtype), "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with whole_file(path) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            for chunk in chunks(tensor, target_of(tensor.dtype, dtype)):
                file.write(chunk)
                if progress is not None:
                    progress(len(chunk))


class Named:
    """A class or function in a pickle that need not exist here."""

    def __init__(self, module, name):
        self.module, self.name = module, name

    def __call__(self, *args):
        raise TypeError(f"{self.module}.{self.name} is only a name")

    def __reduce__(self):
        return self.name


class Instance:
    """An object of a named class with these attributes."""

    def __init__(self, kind, attributes):
        self.kind, self.attributes = kind, attributes

    def __reduce__(self):
        return Named("copyreg", "_reconstructor"), (self.kind, object, None), self.attributes


class Written:
    """A tensor in an object for write_torch; equal objects share their bytes in the file."""

    def __init__(self, tensor, dtype=None):
        self.tensor, self.dtype = tensor, target_of(tensor.dtype, dtype)

    def __reduce__(self):
        stride, step = [], 1
        for extent in reversed(self.tensor.shape):
            stride.insert(0, step)
            step *= max(extent, 1)
        return (Named("torch._utils", "_rebuild_tensor_v2"),
                (_Storage(self), 0, tuple(self.tensor.shape), tuple(stride), False, collections.OrderedDict()))


class _Storage:

    def __init__(self, written):
        self.written = written


_STORAGE_CLASSES = {"F32": "FloatStorage", "F64": "DoubleStorage", "F16": "HalfStorage", "BF16": "BFloat16Storage", "U8": "ByteStorage", "I8": "CharStorage",
                    "I16": "ShortStorage", "I32": "IntStorage", "I64": "LongStorage", "BOOL": "BoolStorage"}


class _Pickler(pickle._Pickler):
    """Pickle's own Python form: the C one imports what it names, and torch need not be here."""

    def __init__(self, file):
        super().__init__(file, protocol=2)
        self.storages = {}    # id(Written) -> (key, Written)

    def persistent_id(self, item):
        if not isinstance(item, _Storage):
            return None
        written = item.written
        key, _ = self.storages.setdefault(id(written), (str(len(self.storages)), written))
        return "storage", Named("torch", _STORAGE_CLASSES[written.dtype]), key, "cpu", written.tensor.numel

    def save_global(self, item, name=None):
        if not isinstance(item, Named):
            return super().save_global(item, name)
        self.write(pickle.GLOBAL + item.module.encode() + b"\n" + item.name.encode() + b"\n")
        self.memoize(item)

    dispatch = dict(pickle._Pickler.dispatch)


def write_torch(path, item, progress=None):
    """`item`, whose tensors are Written, as torch.save writes it."""
    text = io.BytesIO()
    pickler = _Pickler(text)
    pickler.dump(item)
    root = os.path.splitext(os.path.basename(path))[0]
    with whole_file(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        archive.writestr(f"{root}/data.pkl", text.getvalue())
        archive.writestr(f"{root}/byteorder", b"little")
        for key, written in pickler.storages.values():
            with archive.open(zipfile.ZipInfo(f"{root}/data/{key}"), "w", force_zip64=True) as entry:
                for chunk in chunks(written.tensor, written.dtype):
                    entry.write(chunk)
                    if progress is not None:
                        progress(len(chunk))
        archive.writestr(f"{root}/version", b"3\n")
