# SPDX-License-Identifier: Apache-2.0
"""Token data sets in a pair of files: `<prefix>.bin` holds the elements of all items, `<prefix>.idx` where each item lies."""

from __future__ import annotations

import contextlib
import os
import shutil
from array import array
from collections.abc import Iterable

import numpy as np
import torch

from .index_file import Index, MMAP_MAGIC, code, data_file_path, index_file_path, read_index, write_index, write_old_index

__all__ = [
    "IndexedCachedDataset", "IndexedDataset", "IndexedDatasetBuilder", "MMapIndexedDataset", "MMapIndexedDatasetBuilder",
    "best_fitting_dtype", "close_mmap_dataset_builder", "code", "create_doc_idx", "create_mmap_dataset_builder", "data_file_path",
    "dataset_exists", "find_fit_int_dtype", "get_available_dataset_impl", "index_file_path", "infer_dataset_impl", "make_builder",
    "make_dataset"
]


class MMapIndexedDataset(torch.utils.data.Dataset):
    """Read-only view of `<path>.bin` and `<path>.idx`; either layout of index_file.py.

    Item i is a 1-d numpy array in the files' dtype, a view of the mapped file: copy before changing it. Opening checks both files'
    lengths and raises ``IndexFileError`` when one is cut short. Pickles as its path.
    """

    supports_prefetch = False

    def __init__(self, path: str, skip_warmup: bool = True) -> None:
        self._path = os.fspath(path)
        self._index: Index = read_index(self._path)
        self._doc_idx = self._index.doc_idx
        data = data_file_path(self._path)
        self._bytes = np.memmap(data, np.uint8, "r") if os.path.getsize(data) else np.empty(0, np.uint8)
        if not skip_warmup:
            self._bytes[::4096].sum(dtype=np.int64)  # touches every page once, so that later reads find it in memory

    def __getstate__(self):
        return self._path

    def __setstate__(self, path: str) -> None:
        self.__init__(path)

    def __len__(self) -> int:
        return len(self._index.sizes)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self.get(index)

    def get(self, idx: int, offset: int = 0, length: int | None = None) -> np.ndarray:
        """Elements [offset, offset + length) of item idx; to its end without `length`."""
        idx = range(len(self))[idx]
        size = int(self._index.sizes[idx])
        length = size - offset if length is None else length
        if offset < 0 or length < 0 or offset + length > size:
            raise IndexError(f"{self._path}: elements [{offset}, {offset + length}) of item {idx}, which has {size}")
        itemsize = self._index.dtype.itemsize
        begin = int(self._index.pointers[idx]) + offset * itemsize
        return self._bytes[begin:begin + length * itemsize].view(self._index.dtype)

    def elements(self) -> np.ndarray:
        """All elements, item after item, as one array."""
        numel = int(self._index.sizes.sum(dtype=np.int64))
        return self._bytes[:numel * self._index.dtype.itemsize].view(self._index.dtype)

    @property
    def sizes(self) -> np.ndarray:
        """Elements of each item."""
        return self._index.sizes

    def size(self, index: int) -> int:
        return int(self._index.sizes[index])

    num_tokens = size

    @property
    def doc_idx(self) -> np.ndarray:
        """Items at which documents begin, and at the end the number of items."""
        return self._doc_idx

    def get_doc_idx(self) -> np.ndarray:
        return self._doc_idx

    def set_doc_idx(self, doc_idx: np.ndarray) -> None:
        self._doc_idx = doc_idx

    @property
    def dtype(self):
        return self._index.dtype.type

    @staticmethod
    def exists(path: str) -> bool:
        return os.path.exists(index_file_path(path)) and os.path.exists(data_file_path(path))


class IndexedDataset(MMapIndexedDataset):
    """The same under the older layout's name. Items are copies, which may be changed."""

    def get(self, idx: int, offset: int = 0, length: int | None = None) -> np.ndarray:
        return super().get(idx, offset, length).copy()


class IndexedCachedDataset(IndexedDataset):
    """The system's page cache does what a cache of our own would."""

    supports_prefetch = True

    def prefetch(self, indices: Iterable[int]) -> None:
        """Nothing to do: pages are read when they are touched, and stay."""


class MMapIndexedDatasetBuilder:
    """Writes a data set item by item. Nothing stands under the final names before ``finalize``.

    out_file: path of the .bin file. dtype: of the elements; a value that it cannot hold is a ``ValueError``.
    Keeps 4 bytes an item in memory.
    """

    write_index = staticmethod(write_index)

    def __init__(self, out_file: str, dtype=np.int64) -> None:
        code(dtype)
        self._path = os.fspath(out_file)
        self._dtype = np.dtype(dtype)
        self._file = open(self._path + ".part", "wb")
        self._sizes = array("i")
        self._doc_idx = array("q", [0])

    def add_item(self, tensor) -> None:
        """Appends one item: a tensor or array of any shape, written flat."""
        self.add_item_numpy(tensor.detach().cpu().numpy() if isinstance(tensor, torch.Tensor) else tensor)

    def add_item_numpy(self, np_array) -> None:
        self._sizes.append(self._write(np_array))

    def add_items(self, arr_list: Iterable) -> None:
        for item in arr_list:
            self.add_item(item)

    def add_single_elements(self, values: np.ndarray) -> None:
        """Appends ``len(values)`` items of one element each."""
        self._write(values)
        self._sizes.extend(array("i", [1]) * len(values))

    def _write(self, values) -> int:
        values = np.asarray(values).reshape(-1)
        if values.size and not np.can_cast(values.dtype, self._dtype):
            self._check_range(values)
        self._file.write(values.astype(self._dtype, copy=False).tobytes())
        return values.size

    def _check_range(self, values: np.ndarray) -> None:
        if self._dtype.kind not in "iu":
            return
        limits = np.iinfo(self._dtype)
        if values.min() < limits.min or values.max() > limits.max:
            raise ValueError(f"{self._path}: values from {values.min()} to {values.max()} do not fit into {self._dtype}")

    def end_document(self) -> None:
        self._doc_idx.append(len(self._sizes))

    def merge_file_(self, another_file: str) -> None:
        """Appends all items of another data set of the same dtype."""
        other = read_index(another_file)
        if other.dtype != self._dtype:
            raise ValueError(f"{another_file} holds {other.dtype}, {self._path} {self._dtype}; only equal dtypes can be merged")
        first = len(self._sizes)
        self._sizes.extend(other.sizes.tolist())
        self._doc_idx.extend((first + mark for mark in other.doc_idx[1:].tolist()))
        with open(data_file_path(another_file), "rb") as source:
            shutil.copyfileobj(source, self._file, 1 << 22)

    def finalize(self, index_file: str) -> None:
        """Writes the index and gives both files their names."""
        self._file.close()
        index_file = os.fspath(index_file)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(index_file)  # an old index must never stand beside new data
        os.replace(self._path + ".part", self._path)
        self.write_index(index_file, self._dtype, np.asarray(self._sizes), np.asarray(self._doc_idx))


class IndexedDatasetBuilder(MMapIndexedDatasetBuilder):
    """Writes the older layout."""

    write_index = staticmethod(write_old_index)

    def __init__(self, out_file: str, dtype=np.int32) -> None:
        super().__init__(out_file, dtype)


_READERS = {"lazy": IndexedDataset, "cached": IndexedCachedDataset, "mmap": MMapIndexedDataset}
_BUILDERS = {"lazy": IndexedDatasetBuilder, "cached": IndexedDatasetBuilder, "mmap": MMapIndexedDatasetBuilder}


def get_available_dataset_impl() -> list[str]:
    return list(_READERS)


def infer_dataset_impl(path: str) -> str | None:
    """"mmap" or "cached" by the first bytes of the index; None when there is no data set under this name."""
    if not MMapIndexedDataset.exists(path):
        return None
    with open(index_file_path(path), "rb") as file:
        return "mmap" if file.read(len(MMAP_MAGIC)) == MMAP_MAGIC else "cached"


def _implementation(table: dict, impl: str):
    if impl not in table:
        raise ValueError(f"impl: found {impl!r}; allowed: {', '.join(table)}")
    return table[impl]


def make_dataset(path: str, impl: str = "infer", skip_warmup: bool = False) -> MMapIndexedDataset:
    """Opens a data set; "infer" looks at the files."""
    if not MMapIndexedDataset.exists(path):
        raise FileNotFoundError(f"no data set {path}: {index_file_path(path)} and {data_file_path(path)} must both be there")
    return _implementation(_READERS, infer_dataset_impl(path) if impl == "infer" else impl)(path, skip_warmup)


def dataset_exists(path: str, impl: str = "mmap") -> bool:
    _implementation(_READERS, impl)
    return MMapIndexedDataset.exists(path)


def make_builder(out_file: str, impl: str = "mmap", vocab_size: int | None = None) -> MMapIndexedDatasetBuilder:
    """A writer of `out_file` (the .bin). "mmap" takes the smallest dtype for the vocabulary, the others int32."""
    builder = _implementation(_BUILDERS, impl)
    return builder(out_file, best_fitting_dtype(vocab_size)) if impl == "mmap" else builder(out_file)


def best_fitting_dtype(vocab_size: int | None = None):
    """uint16 for vocabularies below 65,500 (the rest is left for special tokens), else int32."""
    return np.uint16 if vocab_size is not None and vocab_size < 65500 else np.int32


def find_fit_int_dtype(min_value: int, max_value: int):
    """The smallest integer dtype that holds both; unsigned if min_value is not negative."""
    kinds = (np.uint8, np.uint16, np.uint32, np.uint64) if min_value >= 0 else (np.int8, np.int16, np.int32, np.int64)
    for kind in kinds:
        if np.iinfo(kind).min <= min_value and max_value <= np.iinfo(kind).max:
            return kind
    raise ValueError(f"no integer dtype holds {min_value} to {max_value}")


def create_doc_idx(sizes: Iterable[int]) -> list[int]:
    """Marks of documents in old files, where an empty item ends a document."""
    return [0] + [number + 1 for number, size in enumerate(sizes) if size == 0]


def create_mmap_dataset_builder(fname: str, dtype) -> MMapIndexedDatasetBuilder:
    """A writer of `<fname>.bin`; close it with ``close_mmap_dataset_builder``."""
    return MMapIndexedDatasetBuilder(data_file_path(fname), dtype)


def close_mmap_dataset_builder(builder: MMapIndexedDatasetBuilder, fname: str) -> None:
    builder.end_document()
    builder.finalize(index_file_path(fname))
