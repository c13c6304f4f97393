# SPDX-License-Identifier: Apache-2.0
"""The ranks that share the saved inputs: each keeps its part of a row, all together give it back."""
import torch

from deepspeed.comm import collectives, process_group
from deepspeed.comm.mpu import bwc_tensor_model_parallel_group, bwc_tensor_model_parallel_world_size
from deepspeed.comm.reduce_op import ReduceOp

# Note [Equal inputs]: only what is equal on all model parallel ranks can be split, and nothing but the data tells. The first tensors after
# configure() are therefore gathered at once and compared, on all ranks, so that all of them raise.
COMPARED_TENSORS = 8


class ModelParallelRanks:
    """Those of a caller's model parallel unit."""

    def __init__(self, mpu):
        self.size = bwc_tensor_model_parallel_world_size(mpu)
        self.group = bwc_tensor_model_parallel_group(mpu) if self.size > 1 else None
        if self.size > 1 and process_group.get_world_size(self.group) != self.size:
            raise ValueError(f"partition_activations: the model parallel unit says it has {self.size} ranks, its group has "
                             f"{process_group.get_world_size(self.group)}")
        self.rank = process_group.get_rank(self.group) if self.size > 1 else 0
        if self.rank < 0:
            raise ValueError("partition_activations: this rank is not in the group of its model parallel unit")
        self._to_compare = COMPARED_TENSORS

    def part_numel(self, row_numel):
        return -(-row_numel // self.size)

    def part_of(self, row):
        """This rank's part: a view. The last ranks' parts may be short or empty."""
        numel = self.part_numel(row.numel())
        begin = min(self.rank * numel, row.numel())
        return row[begin:min(begin + numel, row.numel())]

    def gather(self, part, row_numel):
        """[at least row_numel] elements from every rank's part of part_numel(row_numel)."""
        numel = self.part_numel(row_numel)
        row = torch.empty(numel * self.size, dtype=part.dtype, device=part.device)
        # As bytes: a backend need not know the type.
        collectives.all_gather_into_tensor(row.view(torch.uint8), part.contiguous().view(torch.uint8), group=self.group)
        return row

    def compare(self, row, part, what):
        """Raises on every rank when `row` is not the same everywhere; see Note [Equal inputs]. part: padded to part_numel."""
        if not self._to_compare:
            return
        self._to_compare -= 1
        extent = torch.tensor([row.numel(), -row.numel()], device=row.device)
        collectives.all_reduce(extent, op=ReduceOp.MAX, group=self.group)
        largest, smallest = extent[0].item(), -extent[1].item()
        if largest != smallest:
            raise ValueError(f"partition_activations: {what} has {smallest} elements on one model parallel rank and {largest} on another, "
                             f"here {row.numel()}: {_ADVICE}")
        found = self.gather(part, row.numel())[:row.numel()]
        same = torch.equal(found.view(torch.uint8), row.contiguous().view(torch.uint8))
        verdict = torch.tensor([int(same)], device=row.device)
        collectives.all_reduce(verdict, op=ReduceOp.MIN, group=self.group)
        if not verdict.item():
            raise ValueError(f"partition_activations: {what} is not the same on all model parallel ranks: {_ADVICE}")


_ADVICE = ("only inputs that are equal on all of them can be split over them. Turn partition_activations off where each of these ranks has "
           "a sequence, a slice or data of its own")
