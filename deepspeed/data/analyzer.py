# SPDX-License-Identifier: Apache-2.0
"""Measures every sample of a data set once, and files the samples by difficulty for a curriculum."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Subset

from .analyzer_files import SINGLE_VALUE, ACCUMULATED, part_prefix, reduce_metric
from .indexed_dataset import close_mmap_dataset_builder, create_mmap_dataset_builder

_POLL_S = 0.2


def _share(numel: int, parts: int, part: int) -> range:
    return range(numel * part // parts, numel * (part + 1) // parts)


def _progress(total: int, what: str):
    """A bar on a terminal; nothing elsewhere, or where tqdm is not installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return tqdm(total=total, desc=what, unit="samples", disable=None)


class DataAnalyzer:
    """Two steps: ``run_map`` in every worker measures its share of the samples; ``run_reduce`` in one of them merges the results.

    Args:
        dataset: map-style. sample_indices: number of each of its samples in the data set that will be trained on; default: its own.
        num_workers, worker_id: jobs that share the work, and which one this is. They must see the same `save_path`.
        num_threads: processes of this worker. specific_threads: run only these of them (to repeat what failed).
        num_threads_reduce: not needed; one pass over the results is enough.
        batch_size, collate_fn: how samples reach the metric functions.
        metric_names, metric_functions, metric_types, metric_dtypes: for each measure its name; function(batch) -> integer tensor;
            "single_value_per_sample" (the function gives one value a sample) or "accumulate_value_over_samples" (it gives one tensor,
            which is summed over all batches); and torch dtype (default: that of the function's result).
        custom_map_init, custom_map_update, custom_map_finalize, custom_reduce: replace the parts; see ``run_map``.

    Files, under `save_path/<name>/`: for single values `<name>_sample_to_metric` (one item a sample), `<name>_index_to_metric` (the
    distinct values, ascending), `<name>_index_to_sample` (for each of them its samples), `<name>_index_to_sample_percentile_merged`
    (the same in at most 100 items); for sums `<name>_metric_value`. Each is a pair .bin/.idx, in the smallest dtype that fits, and
    appears only when it is whole. Memory: a few million samples at a time, and the distinct values.
    """

    def __init__(self, dataset: Any, num_workers: int = 1, worker_id: int = 0, num_threads: int = 1, num_threads_reduce: int = 1,
                 specific_threads: Sequence[int] = (), batch_size: int = 1, metric_names: Sequence[str] = (),
                 metric_functions: Sequence[Callable] = (), metric_types: Sequence[str] = (), metric_dtypes: Sequence = (),
                 save_path: str = "./", collate_fn: Callable | None = None, custom_map_init: Callable | None = None,
                 custom_map_update: Callable | None = None, custom_map_finalize: Callable | None = None,
                 custom_reduce: Callable | None = None, sample_indices: Sequence[int] | None = None) -> None:
        if not len(metric_names) == len(metric_functions) == len(metric_types):
            raise ValueError(f"found {len(metric_names)} metric_names, {len(metric_functions)} metric_functions and {len(metric_types)} "
                             "metric_types; there must be as many of each")
        for kind in metric_types:
            if kind not in (SINGLE_VALUE, ACCUMULATED):
                raise ValueError(f"metric_types: found {kind!r}; allowed: {SINGLE_VALUE!r}, {ACCUMULATED!r}")
        if not 0 <= worker_id < num_workers:
            raise ValueError(f"worker_id: found {worker_id}; allowed: 0 to num_workers - 1 = {num_workers - 1}")
        self.dataset, self.sample_indices = dataset, sample_indices
        self.num_workers, self.worker_id = num_workers, worker_id
        self.num_threads, self.num_threads_reduce = num_threads, num_threads_reduce
        self.specific_threads = list(specific_threads)
        self.batch_size, self.collate_fn, self.save_path = batch_size, collate_fn, os.fspath(save_path)
        self.metric_names, self.metric_functions = list(metric_names), list(metric_functions)
        self.metric_types, self.metric_dtypes = list(metric_types), list(metric_dtypes)
        self.custom_map_init, self.custom_map_update = custom_map_init, custom_map_update
        self.custom_map_finalize, self.custom_reduce = custom_map_finalize, custom_reduce
        self._batch_numel = 0  # samples in the batch that is being measured

    # ---- map

    def run_map(self) -> None:
        """Measures this worker's share. ``RuntimeError`` with the traceback of a process that failed.

        Custom parts are called as custom_map_init(thread_id, metric_names, metric_types, metric_dtypes, save_path, worker_id) ->
        results; custom_map_update(batch, metric_types, metric_dtypes, metric_functions, results, index of the batch's first sample);
        custom_map_finalize(metric_types, metric_dtypes, results).
        """
        threads = self.specific_threads or list(range(self.num_threads))
        mine = _share(len(self.dataset), self.num_workers, self.worker_id)
        numel = sum(len(_share(len(mine), self.num_threads, thread)) for thread in threads)
        bar = _progress(numel, "measuring")
        try:
            if self.num_threads == 1:
                self._map_share(0, bar.update if bar is not None else None)
            else:
                self._map_in_processes(threads, bar)
        finally:
            if bar is not None:
                bar.close()

    def _map_in_processes(self, threads: list[int], bar) -> None:
        context = multiprocessing.get_context("fork")  # data sets and functions need not be picklable
        done, failures = context.Value("q", 0), context.SimpleQueue()
        processes = [context.Process(target=self._map_guarded, args=(thread, done, failures), daemon=True) for thread in threads]
        for process in processes:
            process.start()
        shown, error = 0, None
        for process in processes:
            while process.exitcode is None and error is None:
                process.join(_POLL_S)
                error = failures.get() if not failures.empty() else None
                if bar is not None:
                    bar.update(done.value - shown)
                    shown = done.value
        for thread, process in zip(threads, processes):
            if error is not None and process.exitcode is None:
                process.terminate()
            process.join()
            if error is None and process.exitcode:
                error = f"thread {thread} of worker {self.worker_id} ended with exit code {process.exitcode}"
        if error is None and not failures.empty():
            error = failures.get()
        if error is not None:
            raise RuntimeError(f"DataAnalyzer: {error}")

    def _map_guarded(self, thread: int, done, failures) -> None:
        def count(numel: int) -> None:
            with done.get_lock():
                done.value += numel

        try:
            torch.set_num_threads(1)
            self._map_share(thread, count)
        except BaseException:
            failures.put(f"thread {thread} of worker {self.worker_id} failed:\n{traceback.format_exc()}")

    def _map_share(self, thread: int, count: Callable[[int], Any] | None) -> None:
        mine = _share(len(self.dataset), self.num_workers, self.worker_id)
        share = _share(len(mine), self.num_threads, thread)
        first = mine.start + share.start
        loader = DataLoader(Subset(self.dataset, range(first, first + len(share))), self.batch_size, collate_fn=self.collate_fn)
        begin = self.custom_map_init or self.init_metric_results
        update = self.custom_map_update or self.update_metric_results
        finish = self.custom_map_finalize or self.finalize_metric_results
        results = begin(thread, self.metric_names, self.metric_types, self.metric_dtypes, self.save_path, self.worker_id)
        at, end = first, first + len(share)
        for batch in loader:
            self._batch_numel = min(self.batch_size, end - at)
            update(batch, self.metric_types, self.metric_dtypes, self.metric_functions, results, at)
            at += self._batch_numel
            if count is not None:
                count(self._batch_numel)
        finish(self.metric_types, self.metric_dtypes, results)

    def init_metric_results(self, thread_id, metric_names, metric_types, metric_dtypes, save_path, worker_id) -> list[dict]:
        """One record a measure: where it is filed, and what has been found."""
        results = []
        for name in metric_names:
            prefix = part_prefix(save_path, name, worker_id, thread_id)
            os.makedirs(os.path.dirname(prefix), exist_ok=True)
            results.append({"name": name, "prefix": prefix, "builder": None, "sum": None})
        return results

    def update_metric_results(self, data, metric_types, metric_dtypes, metric_functions, metric_results, batch_start_idx=0) -> None:
        for number, (kind, function, result) in enumerate(zip(metric_types, metric_functions, metric_results)):
            values = torch.as_tensor(function(data)).cpu()
            wanted = metric_dtypes[number] if number < len(metric_dtypes) else values.dtype
            if values.dtype != wanted or values.is_floating_point():
                raise TypeError(f"metric {result['name']}: its function gave {values.dtype}, expected {wanted}, an integer dtype; round or "
                                "scale other values yourself")
            if kind == ACCUMULATED:
                result["sum"] = values.clone() if result["sum"] is None else result["sum"] + values
                continue
            if values.numel() != self._batch_numel:
                raise ValueError(
                    f"metric {result['name']}: {values.numel()} values for a batch of {self._batch_numel} samples; a {SINGLE_VALUE} "
                    "function gives one for each")
            if result["builder"] is None:
                result["builder"] = create_mmap_dataset_builder(result["prefix"], values.numpy().dtype)
            result["builder"].add_single_elements(values.reshape(-1).numpy())

    def finalize_metric_results(self, metric_types, metric_dtypes, metric_results) -> None:
        for kind, result in zip(metric_types, metric_results):
            builder = result["builder"] or create_mmap_dataset_builder(result["prefix"], np.int64)  # no sample, no value
            if kind == ACCUMULATED and result["sum"] is not None:
                builder = create_mmap_dataset_builder(result["prefix"], result["sum"].numpy().dtype)
                builder.add_item(result["sum"])
            close_mmap_dataset_builder(builder, result["prefix"])

    # ---- reduce

    def run_reduce(self) -> None:
        """Merges what all workers found. To be called once, when every ``run_map`` has returned."""
        if self.custom_reduce is not None:
            self.custom_reduce(self.dataset, self.metric_names, self.metric_types, self.save_path, self.num_workers, self.num_threads,
                               self.num_threads_reduce)
            return
        for name, kind in zip(self.metric_names, self.metric_types):
            parts = [
                part_prefix(self.save_path, name, worker, thread) for worker in range(self.num_workers)
                for thread in range(self.num_threads)
            ]
            bar = _progress(len(self.dataset), f"filing {name}")
            reduce_metric(kind, parts, os.path.join(self.save_path, name, name), len(self.dataset), self.sample_indices, bar)
            if bar is not None:
                bar.close()

    def run_map_reduce(self, comm_group: Any = None) -> None:
        """Both steps. Several workers must be ranks of a process group (`comm_group`, or the default one)."""
        if self.num_workers == 1:
            self.run_map()
            self.run_reduce()
            return
        dist = torch.distributed
        if not (dist.is_available() and dist.is_initialized()):
            raise ValueError(
                f"num_workers is {self.num_workers}, but there is no process group to wait for the others: call run_map() in every "
                "worker, and when all have returned, run_reduce() in one")
        self.run_map()
        dist.barrier(group=comm_group)
        try:
            if self.worker_id == 0:
                self.run_reduce()
        finally:
            dist.barrier(group=comm_group)


class DistributedDataAnalyzer(DataAnalyzer):
    """One worker for each rank of a process group; ``run_map_reduce()`` is collective. `device` is not needed."""

    def __init__(self, dataset: Any, num_workers: int = 1, num_threads: int = 1, worker_id: int = 0, batch_size: int = 1,
                 metric_names: Sequence[str] = (), metric_functions: Sequence[Callable] = (), metric_types: Sequence[str] = (),
                 save_path: str = "./", collate_fn: Callable | None = None, device: Any = None, comm_group: Any = None,
                 sample_indices: Sequence[int] | None = None) -> None:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            num_workers, worker_id = torch.distributed.get_world_size(comm_group), torch.distributed.get_rank(comm_group)
        super().__init__(dataset, num_workers=num_workers, worker_id=worker_id, num_threads=num_threads, batch_size=batch_size,
                         metric_names=metric_names, metric_functions=metric_functions, metric_types=metric_types, save_path=save_path,
                         collate_fn=collate_fn, sample_indices=sample_indices)
        self.comm_group = comm_group

    def run_map_reduce(self, comm_group: Any = None) -> None:
        super().run_map_reduce(comm_group or self.comm_group)
