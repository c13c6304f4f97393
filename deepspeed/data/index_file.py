# SPDX-License-Identifier: Apache-2.0
"""Index files of token data sets (.idx), byte by byte. Two layouts exist; all numbers are little-endian.

Memory-mapped layout (Megatron's "mmap"):
    9 bytes  "MMIDIDX\\0\\0"
    uint64   version, 1
    uint8    dtype code
    uint64   n, number of items
    uint64   d, number of document marks
    int32[n] elements of each item
    int64[n] where each item begins in the .bin file, in bytes
    int64[d] item at which each document begins, and n at the end

Older layout ("lazy" and "cached"):
    8 bytes  "TNTIDX\\0\\0"
    uint64   version, 1
    uint64   dtype code
    uint64   bytes of an element
    uint64   n, number of items
    uint64   s, number of sizes
    uint64   d, number of document marks
    int64[n+1]  first size of each item
    int64[n+1]  where each item begins in the .bin file, in elements
    int64[s]    sizes of dimensions
    int64[d]    as above

Note [One code, several types]: codes above 5 mean different types in files of different makers (6: uint16, float32 or float64;
7: uint32 or float64; 8: uint64 or uint16). The size of an element settles it. It is in the older header; in the newer one it
follows from the positions of the items.
"""

from __future__ import annotations

import os
import struct
from typing import NamedTuple

import numpy as np

MMAP_MAGIC = b"MMIDIDX\x00\x00"
OLD_MAGIC = b"TNTIDX\x00\x00"
VERSION = 1
_HEADER = struct.Struct("<9sQBQQ")
_OLD_HEADER = struct.Struct("<8sQQQQQQ")
_POINTERS_AT_ONCE = 1 << 20

# Code -> candidates; the first one is what is written.
_TYPES = {
    1: (np.uint8, ), 2: (np.int8, ), 3: (np.int16, ), 4: (np.int32, ), 5: (np.int64, ),
    6: (np.uint16, np.float32, np.float64), 7: (np.uint32, np.float64), 8: (np.uint64, np.uint16),
}  # yapf: disable


class IndexFileError(ValueError):
    """A data set file that is damaged, cut short, or of another kind."""


class Index(NamedTuple):
    """dtype of the elements; elements of each item (int32 or int64); where items begin, in bytes (int64); marks of documents."""
    dtype: np.dtype
    sizes: np.ndarray
    pointers: np.ndarray
    doc_idx: np.ndarray


def index_file_path(prefix: str) -> str:
    return os.fspath(prefix) + ".idx"


def data_file_path(prefix: str) -> str:
    return os.fspath(prefix) + ".bin"


def code(dtype) -> int:
    """The code under which a dtype is written. ``KeyError`` for one that the format does not have."""
    for number, (first, *_) in _TYPES.items():
        if np.dtype(dtype) == np.dtype(first):
            return number
    raise KeyError(f"dtype {np.dtype(dtype)} has no code in index files; allowed: " +
                   ", ".join(str(np.dtype(types[0])) for types in _TYPES.values()))


def _type_of(path: str, number: int, itemsize: int | None) -> np.dtype:
    if number not in _TYPES:
        raise IndexFileError(f"{path}: unknown dtype code {number}; the file is damaged, or was written by something newer")
    for candidate in _TYPES[number]:
        if itemsize is None or np.dtype(candidate).itemsize == itemsize:
            return np.dtype(candidate)
    raise IndexFileError(f"{path}: dtype code {number} does not have elements of {itemsize} bytes; the file is damaged")


def _require_size(path: str, wanted: int) -> None:
    found = os.path.getsize(path)
    if found < wanted:
        raise IndexFileError(f"{path}: cut short: it has {found} bytes, its header promises {wanted}; write it anew")


def _numbers(path: str, dtype, offset: int, count: int) -> np.ndarray:
    return np.memmap(path, dtype, "r", offset, (count, )) if count else np.empty(0, dtype)


def read_index(prefix: str) -> Index:
    """The .idx file of a data set, memory-mapped and checked against the length of the .bin file.

    Raises ``FileNotFoundError``, or ``IndexFileError`` naming the file and what is wrong with it.
    """
    path = index_file_path(prefix)
    with open(path, "rb") as file:
        head = file.read(max(_HEADER.size, _OLD_HEADER.size))
    if head.startswith(MMAP_MAGIC):
        index = _read_mapped(path, head)
    elif head.startswith(OLD_MAGIC):
        index = _read_old(path, head)
    else:
        raise IndexFileError(f"{path}: not an index file: it begins with {head[:9]!r}; expected {MMAP_MAGIC!r} or {OLD_MAGIC!r}")
    _check_data_file(prefix, index)
    return index


def _unpack(path: str, header: struct.Struct, head: bytes):
    if len(head) < header.size:
        raise IndexFileError(f"{path}: cut short: it has {len(head)} bytes, the header alone needs {header.size}; write it anew")
    _, version, *rest = header.unpack_from(head)
    if version != VERSION:
        raise IndexFileError(f"{path}: version {version}; this library reads version {VERSION}")
    return rest


def _read_mapped(path: str, head: bytes) -> Index:
    number, items, documents = _unpack(path, _HEADER, head)
    at = _HEADER.size
    _require_size(path, at + 12 * items + 8 * documents)
    sizes = _numbers(path, "<i4", at, items)
    pointers = _numbers(path, "<i8", at + 4 * items, items)
    doc_idx = _numbers(path, "<i8", at + 12 * items, documents)
    itemsize = _element_bytes(sizes, pointers)
    if itemsize is None and sizes.sum(dtype=np.int64):  # one item: only the .bin file can tell
        held = os.path.getsize(data_file_path(path.removesuffix(".idx"))) / int(sizes.sum(dtype=np.int64))
        itemsize = int(held) if any(np.dtype(t).itemsize == held for t in _TYPES.get(number, ())) else None
    return Index(_type_of(path, number, itemsize), sizes, pointers, doc_idx)


def _element_bytes(sizes: np.ndarray, pointers: np.ndarray) -> int | None:
    """From the first item that is followed by another and not empty; None if there is no such item."""
    followed = np.flatnonzero(sizes[:-1][:_POINTERS_AT_ONCE] > 0)
    if not len(followed):
        return None
    first = int(followed[0])
    return int(pointers[first + 1] - pointers[first]) // int(sizes[first])


def _read_old(path: str, head: bytes) -> Index:
    number, itemsize, items, dimensions, documents = _unpack(path, _OLD_HEADER, head)
    at = _OLD_HEADER.size
    _require_size(path, at + 8 * (2 * (items + 1) + dimensions + documents))
    begin = _numbers(path, "<i8", at + 8 * (items + 1), items + 1)
    doc_idx = _numbers(path, "<i8", at + 8 * (2 * (items + 1) + dimensions), documents)
    return Index(_type_of(path, number, itemsize), np.diff(begin), begin[:-1] * itemsize, doc_idx)


def _check_data_file(prefix: str, index: Index) -> None:
    path = data_file_path(prefix)
    if not len(index.sizes):
        return
    wanted = int(index.pointers[-1]) + int(index.sizes[-1]) * index.dtype.itemsize
    found = os.path.getsize(path)
    if found < wanted:
        raise IndexFileError(f"{path}: cut short: it has {found} bytes, {index_file_path(prefix)} promises {wanted}; write it anew")


def write_index(path: str, dtype, sizes: np.ndarray, doc_idx: np.ndarray) -> None:
    """Writes an index of the memory-mapped layout whose items lie one after the other. Whole or absent.

    sizes: elements of each item, below 2^31. doc_idx: items at which documents begin, and the number of items.
    """
    dtype = np.dtype(dtype)
    sizes = np.asarray(sizes)
    if len(sizes) and sizes.max() > np.iinfo(np.int32).max:
        raise ValueError(f"{path}: an item of {sizes.max()} elements; the format holds up to {np.iinfo(np.int32).max}")
    with open(path + ".part", "wb") as file:
        file.write(_HEADER.pack(MMAP_MAGIC, VERSION, code(dtype), len(sizes), len(doc_idx)))
        file.write(sizes.astype("<i4").tobytes())
        begin = 0
        for first in range(0, len(sizes), _POINTERS_AT_ONCE):
            lengths = sizes[first:first + _POINTERS_AT_ONCE].astype(np.int64) * dtype.itemsize
            ends = begin + np.cumsum(lengths)
            file.write((ends - lengths).astype("<i8").tobytes())
            begin = int(ends[-1])
        file.write(np.asarray(doc_idx).astype("<i8").tobytes())
    os.replace(path + ".part", path)


def write_old_index(path: str, dtype, sizes: np.ndarray, doc_idx: np.ndarray) -> None:
    """The same in the older layout, for readers that need it; items have one dimension."""
    dtype = np.dtype(dtype)
    count = np.arange(len(sizes) + 1)
    begin = np.concatenate([[0], np.cumsum(sizes)])
    with open(path + ".part", "wb") as file:
        file.write(_OLD_HEADER.pack(OLD_MAGIC, VERSION, code(dtype), dtype.itemsize, len(sizes), len(sizes), len(doc_idx)))
        for numbers in (count, begin, sizes, doc_idx):
            file.write(np.asarray(numbers).astype("<i8").tobytes())
    os.replace(path + ".part", path)
