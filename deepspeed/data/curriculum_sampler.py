# SPDX-License-Identifier: Apache-2.0
"""Which samples a curriculum lets in, batch by batch.

Note [Clusters]: whenever the difficulty grows, the samples that it newly lets in form a cluster. Each cluster is walked through in
an order of its own, shuffled anew for every pass. A batch takes from each cluster a number of samples drawn in proportion to the
clusters' sizes. So new samples come in evenly with the old ones, and none is seen again before its cluster is through.

Every rank computes the same batch and takes its part: nothing is exchanged. All choices follow from the seed, the step, and one
position per cluster, so the state is small, the same on every rank, and independent of the number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from deepspeed.telemetry import logger

from .curriculum import CurriculumScheduler
from .metric_index import MetricIndex, shuffled

_SINGLE_CLUSTER = "single_cluster"
_BLOCK = 4096  # samples of a cluster that are looked up at a time


def _option(section: Any, name: str, default: Any) -> Any:
    value = section.get(name) if section is not None else None
    return default if value is None else value


class _Cluster:
    """Samples between two levels of difficulty, and how far they have been walked through."""

    def __init__(self, number: int, after: dict | None, upto: dict, numel: int, sample_at: Callable) -> None:
        self.number, self.after, self.upto = number, after, upto
        self.numel, self.sample_at = numel, sample_at
        self.turn = self.position = 0  # passes that are complete; samples of the current one that were taken
        self._block, self._block_at = np.empty(0, np.int64), (-1, -1)

    def take(self, count: int, seed: int) -> list[np.ndarray]:
        """The next `count` samples."""
        parts = []
        while count:
            block, within = divmod(self.position, _BLOCK)
            if self._block_at != (self.turn, block):
                places = np.arange(block * _BLOCK, min((block + 1) * _BLOCK, self.numel))
                self._block = self.sample_at(shuffled(places, self.numel, (seed, self.number, self.turn)))
                self._block_at = (self.turn, block)
            now = min(count, len(self._block) - within)
            parts.append(self._block[within:within + now])
            count -= now
            self.position += now
            if self.position == self.numel:
                self.turn, self.position = self.turn + 1, 0
        return parts

    def state_dict(self) -> dict:
        return {name: getattr(self, name) for name in ("number", "after", "upto", "turn", "position")}


class DeepSpeedDataSampler:
    """Micro-batches of one rank, as lists of sample numbers, under the curriculum of ``data_efficiency``.

    Args:
        data_efficiency_config: that section, a dict or as the configuration holds it.
        one_epoch_total_samples: length of the data set; `data_sampling.num_epochs` times as many samples are handed out.
        micro_batch_size, gradient_accumulation_steps: of one rank; their product times data_parallel_size is one step.
        data_parallel_rank, data_parallel_size: this rank among those that share the data.
        data_parallel_group, global_rank: not needed; ranks exchange nothing.
        drop_last: leave out the last, incomplete micro-batch.

    The difficulty of step t, counted from 1, holds for every sample of the t-th global batch. Measures of ``clustering_type``
    single_cluster choose no samples; their difficulty is for ``engine.set_data_post_process_func``.
    """

    def __init__(self, data_efficiency_config: Any, one_epoch_total_samples: int, micro_batch_size: int, data_parallel_rank: int,
                 data_parallel_size: int, data_parallel_group: Any = None, gradient_accumulation_steps: int = 1, global_rank: int = 0,
                 drop_last: bool = True) -> None:
        if not 0 <= data_parallel_rank < data_parallel_size:
            raise ValueError(
                f"data_parallel_rank: found {data_parallel_rank}; allowed: 0 to data_parallel_size - 1 = {data_parallel_size - 1}")
        sampling = _option(data_efficiency_config, "data_sampling", {})
        curriculum = _option(sampling, "curriculum_learning", {})
        metrics = _option(curriculum, "curriculum_metrics", {}) if _option(curriculum, "enabled", False) else {}
        self.seed = int(_option(data_efficiency_config, "seed", 1234))
        self.one_epoch_total_samples = one_epoch_total_samples
        self.total_samples = one_epoch_total_samples * int(_option(sampling, "num_epochs", 1000))
        if self.total_samples < 1:
            raise ValueError("one_epoch_total_samples: the data set is empty")
        self.micro_batch_size, self.gradient_accumulation_steps = micro_batch_size, gradient_accumulation_steps
        self.data_parallel_rank, self.data_parallel_size = data_parallel_rank, data_parallel_size
        self.drop_last = drop_last
        self.curriculum_schedulers = {name: CurriculumScheduler(metric) for name, metric in metrics.items()}
        self._indices = {
            name: self._open(name, metric)
            for name, metric in metrics.items() if metric.get("clustering_type") != _SINGLE_CLUSTER
        }
        self.batch: list[int] = []  # samples of the current global batch that were not handed out yet
        self.consumed_samples = self.curriculum_step = self._made = 0
        self.current_difficulties: dict[str, float] = {}
        self._clusters: list[_Cluster] = []

    def _open(self, name: str, metric: Any) -> MetricIndex:
        by_value = _option(metric, "difficulty_type", "value") == "value"
        for key in ("index_to_sample_path", "index_to_metric_path") if by_value else ("index_to_sample_path", ):
            if metric.get(key) is None:
                raise ValueError(f"curriculum_metrics.{name}.{key}: missing; run DataAnalyzer over the data set, or set clustering_type "
                                 f"to \"{_SINGLE_CLUSTER}\"")
        return MetricIndex(name, metric["index_to_sample_path"], metric.get("index_to_metric_path"), by_value, metric["max_difficulty"])

    def __len__(self) -> int:
        """Samples over all ranks and epochs."""
        return self.total_samples

    def set_custom_curriculum_learning_schedule(self, schedule_func_dict: dict[str, Callable[[int], float]]) -> None:
        """Functions step -> difficulty by name of the measure, for measures of schedule_type custom."""
        unknown = set(schedule_func_dict) - set(self.curriculum_schedulers)
        if unknown:
            raise ValueError(
                f"no curriculum measure is called {', '.join(sorted(unknown))}; there are: {', '.join(self.curriculum_schedulers)}")
        for name, function in schedule_func_dict.items():
            self.curriculum_schedulers[name].set_custom_get_difficulty(function)

    # ---- clusters

    def _count(self, name: str, level: dict | None) -> int:
        return self._indices[name].count_up_to(level[name]) if level is not None else 0

    def _cluster(self, number: int, after: dict | None, upto: dict) -> _Cluster:
        """The samples that `upto` lets in and `after` did not."""
        if not self._indices:
            return _Cluster(number, after, upto, self.one_epoch_total_samples, lambda places: places)
        if len(self._indices) == 1:
            (name, index), = self._indices.items()
            first = self._count(name, after)
            return _Cluster(number, after, upto, max(0, self._count(name, upto) - first), lambda places: index.samples(first + places))
        members = np.flatnonzero(self._allowed(upto) & ~self._allowed(after))
        return _Cluster(number, after, upto, len(members), lambda places: members[places])

    def _allowed(self, level: dict | None) -> np.ndarray:
        """Of all samples, which every measure allows; one byte a sample."""
        allowed = np.full(self.one_epoch_total_samples, level is not None)
        for name, index in self._indices.items() if level is not None else ():
            one = np.zeros(self.one_epoch_total_samples, dtype=bool)
            one[self._checked(index.samples(np.arange(self._count(name, level))))] = True
            allowed &= one
        return allowed

    def _checked(self, samples: np.ndarray) -> np.ndarray:
        if len(samples) and not 0 <= samples.min() <= samples.max() < self.one_epoch_total_samples:
            raise ValueError(
                f"index_to_sample_path names sample {samples.max()}, the data set has {self.one_epoch_total_samples}: "
                "analyse this data set anew"
            )
        return samples

    def _move_to(self, level: dict) -> None:
        previous = self.current_difficulties or None
        if level == previous:
            return
        if previous is not None and any(self._count(name, level) < self._count(name, previous) for name in self._indices):
            self._clusters, previous = [], None  # a custom schedule stepped back: what was let in before may be too difficult now
        self.current_difficulties = level
        # Measures that choose no samples open no cluster.
        if previous is None or any(self._count(name, level) != self._count(name, previous) for name in self._indices):
            cluster = self._cluster(self._made, previous, level)
            if cluster.numel:
                self._clusters.append(cluster)
                self._made += 1
                logger.info(f"curriculum step {self.curriculum_step}: difficulties {level} let in {cluster.numel} more samples")
        if not self._clusters:
            easiest = {name: index.easiest() for name, index in self._indices.items()}
            raise ValueError(
                f"curriculum step {self.curriculum_step}: no sample is as easy as {level}; the easiest: {easiest}. Raise min_difficulty")

    def get_next_global_batch(self) -> list[int]:
        """The samples of the next step, over all ranks."""
        self.curriculum_step += 1
        self._move_to({name: scheduler.update_difficulty(self.curriculum_step) for name, scheduler in self.curriculum_schedulers.items()})
        numel = self.micro_batch_size * self.data_parallel_size * self.gradient_accumulation_steps
        chance = np.random.default_rng([self.seed, self.curriculum_step])
        sizes = np.array([cluster.numel for cluster in self._clusters], dtype=np.float64)
        counts = chance.multinomial(numel, sizes / sizes.sum())
        parts = [part for cluster, count in zip(self._clusters, counts) for part in cluster.take(int(count), self.seed)]
        return self._checked(chance.permutation(np.concatenate(parts))).tolist()

    # ---- handing out

    def __iter__(self) -> Iterator[list[int]]:
        together = self.micro_batch_size * self.data_parallel_size
        while self.consumed_samples < self.total_samples:
            numel = min(together, self.total_samples - self.consumed_samples)
            if numel < together and self.drop_last:
                return
            while len(self.batch) < numel:
                self.batch += self.get_next_global_batch()
            current, self.batch = self.batch[:numel], self.batch[numel:]
            self.consumed_samples += numel
            begin, end = self.get_start_end_idx(numel)
            yield current[begin:end]

    def get_start_end_idx(self, batch_len: int | None = None) -> tuple[int, int]:
        """This rank's part of a micro-batch of all ranks."""
        batch_len = batch_len or self.micro_batch_size * self.data_parallel_size
        return (self.data_parallel_rank * batch_len // self.data_parallel_size,
                (self.data_parallel_rank + 1) * batch_len // self.data_parallel_size)

    def state_dict(self) -> dict:
        """Where the job is, the same on every rank. While a micro-batch is being used, that micro-batch counts as consumed."""
        return {
            "batch": list(self.batch),
            "consumed_samples": self.consumed_samples,
            "curriculum_step": self.curriculum_step,
            "current_difficulties": dict(self.current_difficulties),
            "seed": self.seed,
            "clusters_made": self._made,
            "clusters": [cluster.state_dict() for cluster in self._clusters],
        }

    def load_state_dict(self, state_dict: dict) -> None:
        """Continues another sampler's order, also on another number of ranks."""
        if "clusters" not in state_dict:
            raise ValueError("data_sampler: this state was not written by this library; the curriculum starts anew without it")
        for name in ("consumed_samples", "curriculum_step", "seed"):
            setattr(self, name, state_dict[name])
        self.batch, self.current_difficulties = list(state_dict["batch"]), dict(state_dict["current_difficulties"])
        self._made = state_dict["clusters_made"]
        if self.current_difficulties and set(self.current_difficulties) != set(self.curriculum_schedulers):
            raise ValueError(
                f"data_sampler: the state is of the curriculum measures {', '.join(self.current_difficulties)}, the configuration "
                f"has {', '.join(self.curriculum_schedulers)}")
        for name, scheduler in self.curriculum_schedulers.items():
            scheduler.set_current_difficulty(self.current_difficulties.get(name, scheduler.state["min_difficulty"]))
        self._clusters = []
        for saved in state_dict["clusters"]:
            cluster = self._cluster(saved["number"], saved["after"], saved["upto"])
            cluster.turn, cluster.position = saved["turn"], saved["position"]
            self._clusters.append(cluster)
