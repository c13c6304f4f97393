# SPDX-License-Identifier: Apache-2.0
"""From the values that workers found to files of samples by value: a counting sort on disk, in chunks."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from deepspeed.telemetry import logger

from .index_file import data_file_path, index_file_path, write_index
from .indexed_dataset import MMapIndexedDataset, close_mmap_dataset_builder, create_mmap_dataset_builder, find_fit_int_dtype

SINGLE_VALUE = "single_value_per_sample"
ACCUMULATED = "accumulate_value_over_samples"
_CHUNK = 1 << 20
_PERCENTILES = 100


def part_prefix(save_path: str, name: str, worker: int, thread: int) -> str:
    """Where one process files what it found."""
    return os.path.join(save_path, name, f"worker{worker}_thread{thread}", f"{name}_part")


def reduce_metric(kind: str, parts: list[str], target: str, samples: int, sample_indices: Sequence[int] | None, bar=None) -> None:
    """Merges the parts of one measure into the files that begin with `target`. ``FileNotFoundError`` names parts that are not there."""
    missing = [part for part in parts if not MMapIndexedDataset.exists(part)]
    if missing:
        raise FileNotFoundError(f"{len(missing)} of {len(parts)} parts are missing, the first {missing[0]}: run run_map() for it "
                                "(specific_threads repeats single processes)")
    found = [MMapIndexedDataset(part) for part in parts]
    if kind == ACCUMULATED:
        _write_sum(found, target)
        return
    arrays = [one.elements() for one in found]
    numel = sum(len(array) for array in arrays)
    if numel != samples:
        raise ValueError(f"{target}: the parts hold {numel} values, the data set has {samples} samples; run run_map() anew in all workers")
    _write_rows(arrays, target, sample_indices, bar)


def _write_sum(found: list[MMapIndexedDataset], target: str) -> None:
    total = sum(np.asarray(one[0], dtype=np.int64) for one in found if len(one))
    _write(f"{target}_metric_value", find_fit_int_dtype(int(np.min(total)), int(np.max(total))), lambda builder: builder.add_item(total))


def _write(prefix: str, dtype, fill: Callable) -> None:
    builder = create_mmap_dataset_builder(prefix, dtype)
    fill(builder)
    close_mmap_dataset_builder(builder, prefix)


def _chunks(arrays: list[np.ndarray]) -> Iterator[np.ndarray]:
    for array in arrays:
        for first in range(0, len(array), _CHUNK):
            yield array[first:first + _CHUNK]


def _count_values(arrays: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Distinct values, ascending, and how many samples have each."""
    counts: dict[int, int] = {}
    for chunk in _chunks(arrays):
        for value, count in zip(*(numbers.tolist() for numbers in np.unique(chunk, return_counts=True))):
            counts[value] = counts.get(value, 0) + count
    values = sorted(counts)
    return np.array(values, dtype=np.int64), np.array([counts[value] for value in values], dtype=np.int64)


def _write_rows(arrays: list[np.ndarray], target: str, sample_indices: Sequence[int] | None, bar) -> None:
    values, counts = _count_values(arrays)
    if not len(values):
        raise ValueError(f"{target}: the data set is empty")
    kind = find_fit_int_dtype(int(values[0]), int(values[-1]))

    def fill(builder) -> None:
        for chunk in _chunks(arrays):
            builder.add_single_elements(chunk)

    _write(f"{target}_sample_to_metric", kind, fill)
    _write(f"{target}_index_to_metric", kind, lambda builder: builder.add_single_elements(values))
    rows, merged = f"{target}_index_to_sample", f"{target}_index_to_sample_percentile_merged"
    for stale in (index_file_path(rows), index_file_path(merged)):
        if os.path.exists(stale):
            os.unlink(stale)  # an old index must never stand beside new data
    dtype = _sort_samples(arrays, values, counts, sample_indices, data_file_path(rows), bar)
    shutil.copyfile(data_file_path(rows), data_file_path(merged))
    _finish(rows, dtype, counts)
    share = (np.cumsum(counts) - 1) * _PERCENTILES // counts.sum()
    sizes = np.bincount(share, weights=counts, minlength=1).astype(np.int64)
    _finish(merged, dtype, sizes[sizes > 0])
    logger.info(f"{target}: {counts.sum()} samples, {len(values)} distinct values from {values[0]} to {values[-1]}")


def _finish(prefix: str, dtype, sizes: np.ndarray) -> None:
    write_index(index_file_path(prefix), dtype, sizes, np.array([0, len(sizes)]))


def _sort_samples(arrays, values, counts, sample_indices, path: str, bar):
    """Writes all sample numbers by value, and by number within a value. Returns their dtype."""
    numel = int(counts.sum())
    numbers = None if sample_indices is None else np.asarray(sample_indices)
    dtype = np.dtype(find_fit_int_dtype(0, numel - 1 if numbers is None else int(numbers.max())))
    out = np.memmap(path + ".part", dtype, "w+", shape=(numel, ))
    free = np.cumsum(counts) - counts  # next free place of each value
    first = 0
    for chunk in _chunks(arrays):
        order = np.argsort(chunk, kind="stable")
        row = np.searchsorted(values, chunk[order])
        present, run, lengths = np.unique(row, return_index=True, return_counts=True)
        within = np.arange(len(row)) - np.repeat(run, lengths)
        out[free[row] + within] = first + order if numbers is None else numbers[first + order]
        free[present] += lengths
        first += len(chunk)
        if bar is not None:
            bar.update(len(chunk))
    out.flush()
    del out
    os.replace(path + ".part", path)
    return dtype
