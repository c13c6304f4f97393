# SPDX-License-Identifier: Apache-2.0
import os

import numpy as np
import pytest
import torch

from deepspeed.data import DataAnalyzer, DeepSpeedDataSampler, DistributedDataAnalyzer, MMapIndexedDataset
from deepspeed.data import analyzer_files
from tests.parity.launch import run

SINGLE, SUM = "single_value_per_sample", "accumulate_value_over_samples"
LENGTHS = np.random.default_rng(0).integers(1, 40, 101)


class Texts(torch.utils.data.Dataset):
    def __len__(self):
        return len(LENGTHS)

    def __getitem__(self, index):
        return torch.arange(LENGTHS[index])


def lengths(batch):
    return torch.tensor([len(text) for text in batch])


def token_counts(batch):
    return torch.bincount(torch.cat(batch), minlength=40)


def analyzer(folder, **options):
    options = {"batch_size": 4, "collate_fn": list, "metric_names": ["length", "tokens"], "metric_functions": [lengths, token_counts],
               "metric_types": [SINGLE, SUM], "metric_dtypes": [torch.long, torch.long], "save_path": str(folder), **options}
    return DataAnalyzer(Texts(), **options)


def items(folder, name):
    return [item.tolist() for item in MMapIndexedDataset(f"{folder}/{name}")]


def check(folder, numbers=None):
    numbers = np.arange(len(LENGTHS)) if numbers is None else numbers
    assert items(folder, "length/length_sample_to_metric") == [[length] for length in LENGTHS]
    distinct = np.unique(LENGTHS)
    assert items(folder, "length/length_index_to_metric") == [[length] for length in distinct]
    assert items(folder, "length/length_index_to_sample") == [numbers[LENGTHS == length].tolist() for length in distinct]
    assert items(folder, "tokens/tokens_metric_value") == [[int((LENGTHS > token).sum()) for token in range(40)]]
    merged = items(folder, "length/length_index_to_sample_percentile_merged")
    assert len(merged) <= 100 and sum(merged, []) == sum(items(folder, "length/length_index_to_sample"), [])
    assert MMapIndexedDataset(f"{folder}/length/length_index_to_metric").dtype == np.uint8
    assert not [name for _, _, files in os.walk(folder) for name in files if name.endswith(".part")]


@pytest.mark.parametrize("chunk", [1 << 20, 7])
def test_one_worker(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(analyzer_files, "_CHUNK", chunk)  # more than one chunk, and values that span chunks
    analyzer(tmp_path).run_map_reduce()
    check(tmp_path)


def test_workers_and_processes(tmp_path):
    for worker in (1, 0):
        analyzer(tmp_path, num_workers=2, worker_id=worker, num_threads=2).run_map()
    analyzer(tmp_path, num_workers=2, num_threads=2).run_reduce()
    check(tmp_path)


def test_sample_indices(tmp_path):
    numbers = np.random.default_rng(1).permutation(1000)[:len(LENGTHS)]
    analyzer(tmp_path, sample_indices=numbers.tolist()).run_map_reduce()
    check(tmp_path, numbers)


def test_percentiles_are_merged(tmp_path):
    class Many(torch.utils.data.Dataset):
        def __len__(self):
            return 1000

        def __getitem__(self, index):
            return index * 7 % 1000

    DataAnalyzer(Many(), batch_size=50, metric_names=["m"], metric_functions=[lambda batch: batch], metric_types=[SINGLE],
                 save_path=str(tmp_path)).run_map_reduce()
    merged = items(tmp_path, "m/m_index_to_sample_percentile_merged")
    assert [len(item) for item in merged] == [10] * 100 and sorted(sum(merged, [])) == list(range(1000))


def test_what_failed_can_be_repeated(tmp_path):
    def broken(batch):
        raise OSError("disk on fire") if len(batch[0]) == LENGTHS[60] else AssertionError

    def fails_late(batch):
        return broken(batch) if any(len(text) == LENGTHS[60] for text in batch) and os.path.exists(tmp_path / "fire") else lengths(batch)

    (tmp_path / "fire").touch()
    options = dict(num_threads=2, metric_names=["length"], metric_functions=[fails_late], metric_types=[SINGLE], metric_dtypes=[torch.long],
                   batch_size=1)
    with pytest.raises(RuntimeError, match=r"(?s)thread [01] of worker 0 failed:.*disk on fire"):
        analyzer(tmp_path, **options).run_map()
    with pytest.raises(FileNotFoundError, match="parts are missing, the first"):
        analyzer(tmp_path, **options).run_reduce()
    (tmp_path / "fire").unlink()
    for thread in (0, 1):
        analyzer(tmp_path, **options, specific_threads=[thread]).run_map()
    analyzer(tmp_path, **options).run_reduce()
    assert items(tmp_path, "length/length_sample_to_metric") == [[length] for length in LENGTHS]


def test_custom_parts(tmp_path):
    def begin(thread_id, names, types, dtypes, save_path, worker_id):
        return {"longest": 0}

    def update(batch, types, dtypes, functions, results, first):
        results["longest"] = max(results["longest"], int(lengths(batch).max()))

    def finish(types, dtypes, results):
        (tmp_path / "longest").write_text(str(results["longest"]))

    def merge(dataset, names, types, save_path, num_workers, num_threads, num_threads_reduce):
        (tmp_path / "done").touch()

    analyzer(tmp_path, custom_map_init=begin, custom_map_update=update, custom_map_finalize=finish, custom_reduce=merge).run_map_reduce()
    assert int((tmp_path / "longest").read_text()) == LENGTHS.max() and (tmp_path / "done").exists()


@pytest.mark.parametrize("options,error,message", [
    ({"metric_names": ["one"]}, ValueError, "1 metric_names, 2 metric_functions"), ({"metric_types": ["x", SUM]}, ValueError, "found 'x'"),
    ({"worker_id": 1}, ValueError, "worker_id: found 1"),
    ({"metric_dtypes": [torch.int32, torch.long]}, TypeError, "gave torch.int64, expected torch.int32"),
    ({"metric_functions": [lambda batch: lengths(batch)[:1], token_counts]}, ValueError, "1 values for a batch of 4"),
    ({"metric_functions": [lambda batch: lengths(batch).float(), token_counts], "metric_dtypes": []}, TypeError, "an integer dtype"),
    ({"num_workers": 2}, ValueError, "no process group")])  # yapf: disable
def test_errors(tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        analyzer(tmp_path, **options).run_map_reduce()


def _distributed(folder):
    DistributedDataAnalyzer(Texts(),
                            batch_size=4,
                            collate_fn=list,
                            metric_names=["length", "tokens"],
                            metric_functions=[lengths, token_counts],
                            metric_types=[SINGLE, SUM],
                            save_path=folder).run_map_reduce()
    check(folder)
    return True


def test_ranks_as_workers(tmp_path):
    assert run(_distributed, 2, str(tmp_path)) == [True, True]


def test_the_sampler_reads_what_was_written(tmp_path):
    analyzer(tmp_path).run_map_reduce()
    metric = {
        "index_to_sample_path": f"{tmp_path}/length/length_index_to_sample", "index_to_metric_path":
        f"{tmp_path}/length/length_index_to_metric", "difficulty_type": "value", "clustering_type": "schedule_based", "min_difficulty": 10,
        "max_difficulty": 40, "schedule_type": "fixed_linear", "schedule_config": {"total_curriculum_step": 10, "difficulty_step": 10}
    }
    sampler = DeepSpeedDataSampler({"data_sampling": {"curriculum_learning": {"enabled": True, "curriculum_metrics": {"length": metric}}}},
                                   101, 5, 0, 1)
    for step, batch in zip(range(1, 20), sampler):
        assert LENGTHS[batch].max() <= max(10, min(40, (10 + 3 * step) // 10 * 10))
