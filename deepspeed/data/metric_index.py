# SPDX-License-Identifier: Apache-2.0
"""Samples in the order of their difficulty, read from the files of DataAnalyzer; and a shuffle that needs no memory."""

from __future__ import annotations

import numpy as np

from .indexed_dataset import MMapIndexedDataset

_ROUNDS = 10  # four are a good cipher on large ranges; on small ones they favour some places


class MetricIndex:
    """The samples of one measure, easiest first. Position p in that order is element p of the rows of the index file, whose rows
    are sorted by the measure. Nothing is copied: positions are translated into the mapped file when samples are asked for.

    index_to_sample_path: rows of sample numbers. index_to_metric_path: the value of each row; read when `by_value`.
    max_difficulty: the difficulty that stands for all samples, when difficulties are shares of them.
    """

    def __init__(self, name: str, index_to_sample_path: str, index_to_metric_path: str, by_value: bool, max_difficulty: float) -> None:
        self.name, self.by_value, self.max_difficulty = name, by_value, max_difficulty
        self._rows = MMapIndexedDataset(index_to_sample_path)
        sizes = np.asarray(self._rows.sizes, dtype=np.int64)
        order = np.arange(len(sizes))
        self._values = None
        if by_value:
            values = np.asarray(MMapIndexedDataset(index_to_metric_path).elements())
            if len(values) != len(sizes):
                raise ValueError(
                    f"curriculum_metrics.{name}: {index_to_sample_path} has {len(sizes)} rows, {index_to_metric_path} {len(values)}; "
                    "they must come from the same analysis")
            order = np.argsort(values, kind="stable")
            self._values = values[order]
        self._begin = (np.cumsum(sizes) - sizes)[order]  # of each row, in elements of the file
        self._ends = np.cumsum(sizes[order])             # of each row, in positions

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def count_up_to(self, difficulty: float) -> int:
        """How many samples are at most this difficult."""
        if not self.by_value:
            return int(len(self) * min(max(difficulty, 0), self.max_difficulty) // self.max_difficulty)
        rows = int(np.searchsorted(self._values, difficulty, side="right"))
        return int(self._ends[rows - 1]) if rows else 0

    def easiest(self) -> float:
        return self._values[0] if self.by_value else 0

    def samples(self, positions: np.ndarray) -> np.ndarray:
        """Sample numbers (int64) at positions of the order."""
        rows = np.searchsorted(self._ends, positions, side="right")
        before = np.where(rows > 0, self._ends[rows - 1], 0)
        return np.asarray(self._rows.elements()[self._begin[rows] + positions - before], dtype=np.int64)


_ONES = (1 << 64) - 1
_STEPS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))


def _mixed_number(x: int) -> int:
    """splitmix64: every bit of the result depends on every bit of x (Steele, Lea, Flood 2014)."""
    x = (x + 0x9E3779B97F4A7C15) & _ONES
    for shift, factor in _STEPS:
        x = ((x ^ (x >> shift)) * factor) & _ONES
    return x ^ (x >> 31)


def _mixed(x: np.ndarray) -> np.ndarray:
    """The same for each element, but for the first addition; wraps around like C."""
    for shift, factor in _STEPS:
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return x ^ (x >> np.uint64(31))


def _turn_keys(key: tuple[int, ...]) -> list[np.uint64]:
    salt = 0
    for number in key:
        salt = _mixed_number(salt ^ (number & _ONES))
    return [np.uint64(_mixed_number(salt + turn)) for turn in range(_ROUNDS)]


def shuffled(positions: np.ndarray, numel: int, key: tuple[int, ...]) -> np.ndarray:
    """Where a permutation of range(numel), chosen by `key`, puts these positions (int64).

    A Feistel network over the next even number of bits; results outside the range go through it again until they are inside
    (Black and Rogaway 2002, "Ciphers with arbitrary finite domains"). So any part of the order is known without the rest.
    """
    half = np.uint64(max(1, -(-max(numel - 1, 1).bit_length() // 2)))
    mask = (np.uint64(1) << half) - np.uint64(1)
    keys = _turn_keys(key)
    result = np.asarray(positions).astype(np.uint64)
    todo = np.arange(len(result))
    while len(todo):
        left, right = result[todo] >> half, result[todo] & mask
        for turn_key in keys:
            left, right = right, left ^ (_mixed(right ^ turn_key) & mask)
        result[todo] = (left << half) | right
        todo = todo[result[todo] >= np.uint64(numel)]
    return result.astype(np.int64)
