# SPDX-License-Identifier: Apache-2.0
"""Files byte for byte as other libraries write them, round trips, and damage."""
import pickle
import struct

import numpy as np
import pytest
import torch

from deepspeed.data.index_file import IndexFileError
from deepspeed.data.indexed_dataset import (MMapIndexedDataset, MMapIndexedDatasetBuilder, close_mmap_dataset_builder, create_doc_idx,
                                            create_mmap_dataset_builder, dataset_exists, find_fit_int_dtype, infer_dataset_impl,
                                            make_builder, make_dataset)

ITEMS = [[1, 2, 3], [], [4], [5, 6]]


def build(prefix, impl="mmap", vocab_size=100, items=ITEMS):
    builder = make_builder(prefix + ".bin", impl, vocab_size)
    for item in items:
        builder.add_item(torch.tensor(item, dtype=torch.int64))
        builder.end_document()
    builder.finalize(prefix + ".idx")
    return prefix


@pytest.fixture
def prefix(tmp_path):
    return str(tmp_path / "tokens")


def test_bytes_of_the_mapped_layout(prefix):
    build(prefix, items=[[1, 2, 3], [4]])
    header = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 6, 2, 3)
    expected = header + struct.pack("<2i", 3, 1) + struct.pack("<2q", 0, 6) + struct.pack("<3q", 0, 1, 2)
    assert open(prefix + ".idx", "rb").read() == expected
    assert open(prefix + ".bin", "rb").read() == struct.pack("<4H", 1, 2, 3, 4)


def test_bytes_of_the_older_layout(prefix):
    build(prefix, "lazy", items=[[1, 2, 3]])
    expected = b"TNTIDX\0\0" + struct.pack("<6Q", 1, 4, 4, 1, 1, 2) + struct.pack("<2q2q1q2q", 0, 1, 0, 3, 3, 0, 1)
    assert open(prefix + ".idx", "rb").read() == expected
    assert open(prefix + ".bin", "rb").read() == struct.pack("<3i", 1, 2, 3)


@pytest.mark.parametrize("impl", ["mmap", "lazy", "cached"])
def test_round_trip(prefix, impl):
    build(prefix, impl)
    data = make_dataset(prefix)
    assert infer_dataset_impl(prefix) == ("mmap" if impl == "mmap" else "cached") and dataset_exists(prefix)
    assert len(data) == 4 and [item.tolist() for item in data] == ITEMS and data.dtype == (np.uint16 if impl == "mmap" else np.int32)
    assert data.sizes.tolist() == [3, 0, 1, 2] and data.doc_idx.tolist() == [0, 1, 2, 3, 4] and data.size(3) == 2
    assert data.get(0, offset=1).tolist() == [2, 3] and data.get(0, 1, 1).tolist() == [2] and data[-1].tolist() == [5, 6]
    assert [item.tolist() for item in data[1:3]] == [[], [4]] and data.elements().tolist() == [1, 2, 3, 4, 5, 6]
    assert [item.tolist() for item in pickle.loads(pickle.dumps(data))] == ITEMS
    with pytest.raises(IndexError):
        data[4]
    with pytest.raises(IndexError, match="item 0, which has 3"):
        data.get(0, 2, 2)


@pytest.mark.parametrize("number,dtype", [(6, np.uint16), (6, np.float32), (6, np.float64), (7, np.uint32), (7, np.float64), (8, np.uint64),
                                          (8, np.uint16)])
@pytest.mark.parametrize("items", [[[7, 8], [9]], [[7, 8, 9]]])
def test_one_code_of_several_makers(prefix, number, dtype, items):
    """See Note [One code, several types]."""
    flat = np.array(sum(items, []), dtype)
    flat.tofile(prefix + ".bin")
    sizes = [len(item) for item in items]
    begin = (np.cumsum(sizes) - sizes) * np.dtype(dtype).itemsize
    with open(prefix + ".idx", "wb") as file:
        file.write(b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, number, len(items), 1))
        file.write(np.array(sizes, "<i4").tobytes() + begin.astype("<i8").tobytes() + np.zeros(1, "<i8").tobytes())
    data = MMapIndexedDataset(prefix)
    assert data.dtype == dtype and [item.tolist() for item in data] == items


def test_merge(prefix):
    first, second = build(prefix + "1"), build(prefix + "2", items=[[8, 9]])
    builder = MMapIndexedDatasetBuilder(prefix + ".bin", np.uint16)
    builder.merge_file_(first), builder.merge_file_(second)
    builder.finalize(prefix + ".idx")
    merged = MMapIndexedDataset(prefix)
    assert [item.tolist() for item in merged] == ITEMS + [[8, 9]] and merged.doc_idx.tolist() == [0, 1, 2, 3, 4, 5]
    with pytest.raises(ValueError, match="only equal dtypes"):
        MMapIndexedDatasetBuilder(prefix + "3.bin", np.int32).merge_file_(first)


def test_empty(prefix):
    close_mmap_dataset_builder(create_mmap_dataset_builder(prefix, np.int32), prefix)
    assert len(MMapIndexedDataset(prefix)) == 0 and list(MMapIndexedDataset(prefix)) == []


def test_nothing_stands_before_it_is_whole(prefix):
    builder = create_mmap_dataset_builder(prefix, np.uint8)
    builder.add_item([1])
    assert not MMapIndexedDataset.exists(prefix)
    with pytest.raises(ValueError, match="values from 1 to 256 do not fit into uint8"):
        builder.add_item([1, 256])
    close_mmap_dataset_builder(builder, prefix)
    assert MMapIndexedDataset.exists(prefix) and MMapIndexedDataset(prefix)[0].tolist() == [1]


@pytest.mark.parametrize("name,keep,message", [
    (".idx", 5, "not an index file"), (".idx", 20, "cut short: it has 20 bytes, the header alone needs 34"),
    (".idx", 60, "cut short: it has 60 bytes, its header promises 122"),
    (".bin", 7, "cut short: it has 7 bytes, .*idx promises 12")])  # yapf: disable
def test_cut_short(prefix, name, keep, message):
    build(prefix)
    whole = open(prefix + name, "rb").read()
    open(prefix + name, "wb").write(whole[:keep])
    with pytest.raises(IndexFileError, match=message):
        MMapIndexedDataset(prefix)


@pytest.mark.parametrize("at,byte,message", [(9, 2, "version 2"), (17, 99, "unknown dtype code 99"), (17, 4, "elements of 2 bytes")])
def test_damaged_header(prefix, at, byte, message):
    build(prefix)
    content = bytearray(open(prefix + ".idx", "rb").read())
    content[at] = byte
    open(prefix + ".idx", "wb").write(content)
    with pytest.raises(IndexFileError, match=message):
        MMapIndexedDataset(prefix)


def test_absent_and_unknown(prefix):
    with pytest.raises(FileNotFoundError, match="must both be there"):
        make_dataset(prefix)
    assert infer_dataset_impl(prefix) is None
    with pytest.raises(ValueError, match="impl: found 'x'"):
        make_builder(prefix + ".bin", "x")
    with pytest.raises(KeyError, match="float32 has no code"):
        MMapIndexedDatasetBuilder(prefix + ".bin", np.float32)


def test_small_helpers():
    assert find_fit_int_dtype(0, 255) is np.uint8 and find_fit_int_dtype(0, 256) is np.uint16 and find_fit_int_dtype(-1, 128) is np.int16
    assert create_doc_idx([3, 0, 2, 0]) == [0, 2, 4]
