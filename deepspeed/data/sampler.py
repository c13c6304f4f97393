# SPDX-License-Identifier: Apache-2.0
"""Which samples a rank sees, and in which order.

Note [Exact resume]
    An epoch is one order of the whole data set, the same on every rank. Rank r of N takes every N-th sample from
    position r on, so after each rank has taken k samples, together they have taken exactly the first k * N of that
    order. A position is therefore one number, `start`, for the whole job and independent of N: a job that was stopped
    on 4 ranks continues on 2 with the samples that nobody has seen yet.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sized
from typing import Any

import torch
from torch.utils.data import DistributedSampler


class ResumableDistributedSampler(DistributedSampler):
    """torch's ``DistributedSampler`` that can begin an epoch in the middle.

    With ``start == 0`` it yields what torch's does. ``start`` counts samples of the whole job; see Note [Exact resume].
    """

    start = 0

    def order(self) -> list[int]:
        """Indices of the whole epoch, before they are dealt out."""
        numel = len(self.dataset)
        if not self.shuffle:
            return list(range(numel))
        generator = torch.Generator()
        generator.manual_seed(self.seed + self.epoch)
        return torch.randperm(numel, generator=generator).tolist()

    def __iter__(self) -> Iterator[int]:
        order = self.order()
        rest = order[self.start:]
        if self.drop_last:
            rest = rest[:len(rest) - len(rest) % self.num_replicas]
        elif len(rest) % self.num_replicas:
            # Ranks must agree on the number of batches: fill up from the head of the order, as torch does.
            missing = self.num_replicas - len(rest) % self.num_replicas
            rest = rest + (order * (missing // len(order) + 1))[:missing]
        return iter(rest[self.rank::self.num_replicas])


class BatchIndices:
    """Batches of indices from a sampler, after leaving out the first ``skip`` indices.

    Skipping here costs nothing per sample: what is skipped is never loaded.
    """

    def __init__(self, sampler: Any, batch_size: int, drop_last: bool) -> None:
        self.sampler = sampler
        self.batch_size = batch_size
        self.drop_last = drop_last
        self.skip = 0

    def __iter__(self) -> Iterator[list[int]]:
        batch: list[int] = []
        for position, index in enumerate(self.sampler):
            if position < self.skip:
                continue
            batch.append(index)
            if len(batch) == self.batch_size:
                yield batch
                batch = []
        if batch and not self.drop_last:
            yield batch

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        if not isinstance(self.sampler, Sized):
            raise TypeError(f"data_sampler: {type(self.sampler).__name__} has no length")
        numel = len(self.sampler)
        return numel // self.batch_size if self.drop_last else -(-numel // self.batch_size)


class FollowedSampler:
    """Batches of a sampler that knows its own position, and the position of the last batch that was used.

    A DataLoader with worker processes asks for batches ahead of their use, so each batch's position is kept until then.
    """

    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler
        self.state = sampler.state_dict()
        self._ahead: deque[dict] = deque()

    def __iter__(self) -> Iterator[list[int]]:
        self.rewind()
        for batch in self.sampler:
            self._ahead.append(self.sampler.state_dict())
            yield batch

    def __len__(self) -> int:
        """Batches of this rank over all epochs."""
        together = self.sampler.micro_batch_size * self.sampler.data_parallel_size
        return len(self.sampler) // together if self.sampler.drop_last else -(-len(self.sampler) // together)

    def advance(self) -> None:
        """One more batch was used."""
        self.state = self._ahead.popleft()

    def rewind(self) -> None:
        """The next pass begins after the last batch that was used."""
        self._ahead.clear()
        self.sampler.load_state_dict(self.state)

    def load(self, state: dict) -> None:
        self.state = state
        self.rewind()
