# SPDX-License-Identifier: Apache-2.0
"""Files of torch.save, opened without torch and without reading tensors.

    zip       <name>/data.pkl, the pickle; <name>/data/<key>, a storage's bytes, stored uncompressed; <name>/byteorder
    older     five pickles (magic number, protocol, system, the object, list of storage keys), then for each key 8 bytes numel and the elements
"""
import io
import pickle
import struct
import zipfile

from deepspeed.checkpoint.foreign.tensor_ref import ITEM_BYTES, StorageRef
from deepspeed.checkpoint.foreign.unpickle import Unpickler, settle

_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001
_PICKLE_LIMIT_BYTES = 1 << 30   # the pickle itself, tensors apart


class TorchFileError(ValueError):
    """Not a file of torch.save, or a broken one."""


def load(path):
    """What torch.save was given, with tensors as TensorRef and known objects as Record. Raises TorchFileError, UnsafePickleError, OSError."""
    path = str(path)
    try:
        with open(path, "rb") as file:
            found = _load_zip(path, file) if file.read(2) == b"PK" else _load_older(path, file)
            return settle(found)
    except zipfile.BadZipFile as error:
        raise TorchFileError(f"{path}: {error}") from None
    except pickle.UnpicklingError as error:
        raise error if isinstance(error, ValueError) else TorchFileError(f"{path}: {error}") from None
    except (EOFError, KeyError, IndexError, TypeError, AttributeError, struct.error, OverflowError, ImportError) as error:
        raise TorchFileError(f"{path}: not a file of torch.save, or damaged ({type(error).__name__}: {error})") from error


def _load_zip(path, file):
    file.seek(0, io.SEEK_END)
    size = file.tell()
    archive = zipfile.ZipFile(file)
    entries = {info.filename: info for info in archive.infolist()}
    pickles = [name for name in entries if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise TorchFileError(f"{path}: a zip file without one data.pkl")
    root = pickles[0][:-len("data.pkl")]

    def place(name):
        """(offset, bytes) of a stored entry."""
        info = entries.get(root + name)
        if info is None:
            raise TorchFileError(f"{path}: its entry {name} is missing")
        if info.compress_type != zipfile.ZIP_STORED:
            raise TorchFileError(f"{path}: its entry {name} is compressed")
        file.seek(info.header_offset)
        header = file.read(30)
        if len(header) != 30 or header[:4] != b"PK\3\4":
            raise TorchFileError(f"{path}: its entry {name} has no header")
        name_bytes, extra_bytes = struct.unpack("<HH", header[26:30])
        begin = info.header_offset + 30 + name_bytes + extra_bytes
        if begin + info.file_size > size:
            raise TorchFileError(f"{path}: its entry {name} reaches past the end of the file")
        return begin, info.file_size

    def contents(name, limit):
        begin, length = place(name)
        if length > limit:
            raise TorchFileError(f"{path}: its entry {name} has {length} bytes")
        file.seek(begin)
        return file.read(length)

    if root + "byteorder" in entries and contents("byteorder", 16).strip() != b"little":
        raise TorchFileError(f"{path}: was written by a big-endian machine")

    def storage_at(key, dtype, numel):
        begin, length = place(f"data/{key}")
        if length < numel * ITEM_BYTES[dtype]:
            raise TorchFileError(f"{path}: storage {key} has {length} bytes, needed are {numel} of {dtype}")
        return StorageRef(path, begin, dtype, numel)

    text = contents("data.pkl", _PICKLE_LIMIT_BYTES)
    import zlib
    if zlib.crc32(text) != entries[pickles[0]].CRC:
        raise TorchFileError(f"{path}: the checksum of data.pkl is wrong")
    return Unpickler(io.BytesIO(text), path, storage_at).load()


def _load_older(path, file):
    file.seek(0)

    def no_storage(key, dtype, numel):
        raise pickle.UnpicklingError("a storage where none may be")

    def plain():
        return Unpickler(file, path, no_storage).load()

    try:
        magic = plain()
    except (pickle.UnpicklingError, EOFError, ValueError):
        magic = None
    if magic != _MAGIC:
        raise TorchFileError(f"{path}: is not a file of torch.save")
    if plain() != _PROTOCOL:
        raise TorchFileError(f"{path}: torch.save of an unknown protocol")
    system = plain()
    if not system.get("little_endian", True):
        raise TorchFileError(f"{path}: was written by a big-endian machine")
    storages = {}

    def storage_at(key, dtype, numel):
        storages[key] = StorageRef(path, -1, dtype, numel)
        return storages[key]

    found = Unpickler(file, path, storage_at).load()
    keys = plain()
    offset = file.tell()
    file.seek(0, io.SEEK_END)
    size = file.tell()
    for key in keys:
        storage = storages[key]
        file.seek(offset)
        numel, = struct.unpack("<q", file.read(8))
        storage.offset_bytes = offset + 8
        offset += 8 + storage.nbytes
        if numel != storage.numel or offset > size:
            raise TorchFileError(f"{path}: storage {key} has {numel} elements, needed are {storage.numel}; the file has {size} bytes")
    if any(storage.offset_bytes < 0 for storage in storages.values()):
        raise TorchFileError(f"{path}: a storage's bytes are missing")
    return found
