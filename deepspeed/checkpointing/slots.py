# SPDX-License-Identifier: Apache-2.0
"""Memory for the saved inputs of a pass, made in one piece: with contiguous_checkpointing, nothing is left scattered between what
forward and backward allocate and free."""
import weakref
from collections import deque

import torch

from deepspeed.telemetry.logs import logger


class _Block:
    """`count` slots of `numel` elements each. A slot is free again when nobody holds its tensor any more."""

    def __init__(self, numel, count, dtype, device, pinned):
        self.numel, self.count = numel, count
        self.memory = torch.empty(numel * count, dtype=dtype, device=device, pin_memory=pinned)
        self.free = deque(range(count))

    def take(self, numel):
        slot = self.free.popleft()
        # `.data`: with a version counter of its own, or writing one slot would look to autograd like a change of all others.
        tensor = self.memory.data[slot * self.numel:slot * self.numel + numel]
        weakref.finalize(tensor, self.free.append, slot).atexit = False
        return tensor


class Slots:
    """Blocks by what rests in them: the same argument of every checkpoint shares one."""

    def __init__(self):
        self._blocks = {}

    def take(self, argument, numel, dtype, device, pinned, count):
        """An uninitialised tensor [numel] in the block of this argument, which has `count` slots to begin with."""
        key = (argument, dtype, torch.device(device), pinned)
        block = self._blocks.get(key)
        if block is None or numel > block.numel:
            # A longer input than ever: the old block ends with the tensors in it.
            block = self._blocks[key] = _Block(numel, count, dtype, device, pinned)
        elif not block.free:
            more = 2 * block.count
            logger.warning("activation checkpointing: all %d preallocated buffers of argument %d are in use: number_checkpoints is too "
                           "small, or outputs of earlier passes are still held; making %d more", block.count, argument, more)
            block = self._blocks[key] = _Block(block.numel, more, dtype, device, pinned)
        return block.take(numel)

    @property
    def nbytes(self):
        return sum(block.memory.nbytes for block in self._blocks.values())

    def clear(self):
        """Memory of slots in use stays until they are free."""
        self._blocks.clear()
