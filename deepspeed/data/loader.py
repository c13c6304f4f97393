# SPDX-License-Identifier: Apache-2.0
"""The engine's data loader: micro-batches of this rank's share, epoch after epoch, with a position that can be saved."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from deepspeed.telemetry import logger

from .curriculum_sampler import DeepSpeedDataSampler
from .sampler import BatchIndices, FollowedSampler, ResumableDistributedSampler


class DeepSpeedDataLoader:
    """Micro-batches of one rank's share of ``dataset``.

    Args:
        dataset: map-style, dealt out to the ranks by a distributed sampler; or an ``IterableDataset``, which is read as
            it is and has to divide itself among the ranks.
        batch_size: samples in a micro-batch of one rank.
        pin_memory: copy batches into page-locked memory; ignored where there is no GPU.
        tput_timer: a ``ThroughputTimer``, or anything with ``start()``, called before each batch is fetched.
        collate_fn: samples -> batch; torch's default when None.
        num_local_io_workers: worker processes; None or 0 loads in this process.
        data_sampler: replaces the distributed sampler. To resume exactly it must give the same order again. A
            ``DeepSpeedDataSampler`` makes whole batches by itself, and its epochs are one pass.
        data_parallel_world_size, data_parallel_rank: the ranks that share the data; default: the process group's.
        dataloader_drop_last: leave out the last, incomplete batch.
        seed, shuffle: order of the distributed sampler; the order of epoch e is the permutation of ``seed + e``.

    Every ``iter()`` is one epoch, and every full epoch has an order of its own. ``state_dict()`` may be taken between
    any two batches; a loader that loads it gives next the batch that would have come next, also on another number of
    ranks or with another batch size (see Note [Exact resume] in sampler.py).
    """

    def __init__(self,
                 dataset: Any,
                 batch_size: int,
                 pin_memory: bool = False,
                 local_rank: int = 0,
                 tput_timer: Any = None,
                 collate_fn: Callable | None = None,
                 num_local_io_workers: int | None = None,
                 data_sampler: Any = None,
                 data_parallel_world_size: int | None = None,
                 data_parallel_rank: int | None = None,
                 dataloader_drop_last: bool = False,
                 *,
                 seed: int = 0,
                 shuffle: bool = True) -> None:
        if int(batch_size) != batch_size or batch_size < 1:
            raise ValueError(f"batch_size: expected a whole number of at least 1, got {batch_size!r}")
        self.dataset = dataset
        self.batch_size = int(batch_size)
        self.local_rank = local_rank
        self.tput_timer = tput_timer
        self.post_process_func: Callable | None = None
        self.world_size, self.rank = _data_parallel_place(data_parallel_world_size, data_parallel_rank)
        self.epoch = 0
        self._start = 0  # samples of this epoch, over all ranks, that were consumed before the loader was restored
        self._batches = 0  # batches of this epoch handed out since then
        self._iterator: Iterator | None = None  # of the DataLoader; None until the position has been set
        # The current pass by number: a reference to it would be a cycle, and a DataLoader that dies in the cycle
        # collector waits 5 s for each worker.
        self._pass = 0

        options = dict(collate_fn=collate_fn,
                       pin_memory=bool(pin_memory) and torch.cuda.is_available(),
                       num_workers=num_local_io_workers or 0,
                       persistent_workers=bool(num_local_io_workers))
        self.is_iterable = isinstance(dataset, IterableDataset)
        self._followed: FollowedSampler | None = None
        if self.is_iterable:
            if data_sampler is not None:
                raise ValueError("data_sampler: an IterableDataset has no indices to sample")
            self.data_sampler = self._indices = None
            self.dataloader = DataLoader(dataset, self.batch_size, drop_last=dataloader_drop_last, **options)
        elif isinstance(data_sampler, DeepSpeedDataSampler):
            self.data_sampler, self._indices = data_sampler, None
            self._followed = FollowedSampler(data_sampler)
            self.dataloader = DataLoader(dataset, batch_sampler=self._followed, **options)
        else:
            self.data_sampler = data_sampler if data_sampler is not None else ResumableDistributedSampler(
                dataset, self.world_size, self.rank, shuffle=shuffle, seed=seed, drop_last=dataloader_drop_last)
            self._indices = BatchIndices(self.data_sampler, self.batch_size, dataloader_drop_last)
            self.dataloader = DataLoader(dataset, batch_sampler=self._indices, **options)

        # Its owner, an engine say, may be part of a cycle. Workers that end with a cycle are waited for 5 s each.
        weakref.finalize(self, _stop_workers, self.dataloader)

    def __len__(self) -> int:
        """Batches of a whole epoch on this rank."""
        return len(self.dataloader)

    def __iter__(self) -> "_Epoch":
        """A pass over one epoch: the rest of the current one after ``load_state_dict``, else a whole one."""
        if self._batches:  # left in the middle; an exhausted pass has already moved on
            self._next_epoch()
            if self.tput_timer is not None:
                self.tput_timer.started = False  # nobody trains on the batch that was fetched last
        self._pass += 1
        return _Epoch(self, self._pass)

    def __next__(self) -> Any:
        return next(_Epoch(self, self._pass))

    def _draw(self) -> Any:
        if self._iterator is None:
            self._place()
            self._iterator = iter(self.dataloader)
            if self.is_iterable:
                self._skip_stream()
        began = self._begin_step()
        try:
            batch = next(self._iterator)
        except StopIteration:
            if began:
                self.tput_timer.started = False  # what follows an epoch, an evaluation say, is no time of a step
            raise
        self._batches += 1
        if self._followed is not None:
            self._followed.advance()
        if self.post_process_func is None:
            return batch
        return self.post_process_func(batch, self.state_dict() if self._followed is None else self._followed.state)

    def _begin_step(self) -> bool:
        """The wait for a batch belongs to its step; False if a step is running already, whose time this is."""
        if self.tput_timer is None or getattr(self.tput_timer, "started", False):
            return False
        self.tput_timer.start()
        return True

    def _skip_stream(self) -> None:
        """Batches of an IterableDataset that were consumed before: read again and thrown away, since a stream cannot seek."""
        batches, rest = divmod(self._start, self.batch_size * self.world_size)
        if rest:
            logger.warning(
                f"data loader: an IterableDataset divides itself, so the position {self._start} can be reached in whole batches of "
                f"all ranks only ({self.batch_size} x {self.world_size}); the last {rest} samples before it are read again")
        for _ in range(batches):
            next(self._iterator, None)

    def _next_epoch(self) -> None:
        self.epoch += 1
        self._start = self._batches = 0
        if self._followed is not None:
            self._followed.rewind()
        self._iterator = None

    def _place(self) -> None:
        """Tell the sampler which epoch it is and where in it to begin."""
        sampler = self.data_sampler
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(self.epoch)
        if isinstance(sampler, ResumableDistributedSampler):
            sampler.start = self._start
        elif self._indices is not None:
            self._indices.skip = self._start // self.world_size

    def state_dict(self) -> dict:
        """Where the job is: the same on every rank, so saving it once is enough. With worker processes too, what they have fetched
        ahead does not count."""
        state = {
            "epoch": self.epoch,
            "consumed_samples": self._start + self._batches * self.batch_size * self.world_size,
            "dataset_samples": None if self.is_iterable else len(self.dataset),
        }
        if isinstance(self.data_sampler, DistributedSampler):
            state["seed"] = self.data_sampler.seed
        if self._followed is not None:
            state["data_sampler"] = self._followed.state
        return state

    def load_state_dict(self, state_dict: dict) -> None:
        """Continue where another loader stopped. ``ValueError`` when the data set has another length, because then
        no position in it means the same, or when one of the two follows a curriculum and the other does not."""
        samples = None if self.is_iterable else len(self.dataset)
        if state_dict["dataset_samples"] != samples:
            raise ValueError(f"state_dict: it was saved with a data set of {state_dict['dataset_samples']} samples, "
                             f"this one has {samples}; without loading it, training starts at the first sample")
        if ("data_sampler" in state_dict) != (self._followed is not None):
            raise ValueError("state_dict: one of the saved loader and this one follows a curriculum, the other does not; "
                             "set data_efficiency.data_sampling.curriculum_learning.enabled as it was")
        if self._followed is not None:
            self._followed.load(state_dict["data_sampler"])
        if "seed" in state_dict and isinstance(self.data_sampler, DistributedSampler):
            self.data_sampler.seed = state_dict["seed"]
        self.epoch = int(state_dict["epoch"])
        self._start = int(state_dict["consumed_samples"])
        self._batches = 0
        self._iterator = None


class _Epoch:
    """One pass over a loader. It ends with its epoch, and a newer pass replaces it."""

    def __init__(self, loader: DeepSpeedDataLoader, number: int) -> None:
        self.loader = loader
        self.number = number
        self.ended = False

    def __iter__(self) -> "_Epoch":
        return self

    def __next__(self) -> Any:
        if self.ended:
            raise StopIteration
        if self.loader._pass != self.number:
            raise RuntimeError("a newer pass over this data loader has begun; one loader has one position")
        try:
            return self.loader._draw()
        except StopIteration:
            self.ended = True
            self.loader._next_epoch()
            raise


def _stop_workers(dataloader: DataLoader) -> None:
    workers = dataloader._iterator
    if workers is not None:
        workers._shutdown_workers()


def _data_parallel_place(world_size: int | None, rank: int | None) -> tuple[int, int]:
    if (world_size is None) != (rank is None):
        raise ValueError("data_parallel_world_size and data_parallel_rank belong together; give both or none")
    if world_size is None:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_world_size(), torch.distributed.get_rank()
        return 1, 0
    return world_size, rank


class RepeatingLoader:
    """Endless ``iter``/``next`` over a loader, which is started again at its end."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader
        self.data_iter = iter(loader)

    def __iter__(self) -> "RepeatingLoader":
        return self

    def __next__(self) -> Any:
        try:
            return next(self.data_iter)
        except StopIteration:
            pass
        self.data_iter = iter(self.loader)
        try:
            return next(self.data_iter)
        except StopIteration:
            raise ValueError(f"loader: {type(self.loader).__name__} is empty, there is nothing to repeat") from None

    def __len__(self) -> int:
        """Batches until it repeats."""
        return len(self.loader)

    def state_dict(self) -> dict:
        return self.loader.state_dict()

    def load_state_dict(self, state_dict: dict) -> None:
        self.loader.load_state_dict(state_dict)
        self.data_iter = iter(self.loader)
