# SPDX-License-Identifier: Apache-2.0
"""A tensor of which every rank of a group keeps one consecutive part."""
import math

import torch

from deepspeed.comm import collectives, process_group
from deepspeed.parallel.partition import partition_uniform


class PartitionedTensor:
    """Every rank of `group` has the whole `tensor` at construction and keeps 1/size of it; `full()` brings it back.

    `to_meta()` is an int64 tensor that, sent to another rank together with `data()`, lets `from_meta` build the object there.
    """

    def __init__(self, tensor, group, partition_meta=None):
        self.group = group
        self.num_parts = process_group.get_world_size(group)
        self.rank = process_group.get_rank(group)
        self.orig_size = list(tensor.size())
        self.orig_device = tensor.device
        self.partition = partition_uniform(tensor.numel(), self.num_parts)
        begin, end = self.partition[self.rank:self.rank + 2]
        self.local_data = tensor.detach().reshape(-1)[begin:end].clone()

    @classmethod
    def from_meta(cls, meta, local_part, group, device=None):
        """The object of which `meta` came by `to_meta` and `local_part` by `data` on a rank of the same place in its group."""
        made = cls.__new__(cls)
        values = meta.tolist()
        made.group = group
        made.num_parts, made.rank = process_group.get_world_size(group), process_group.get_rank(group)
        if values[0] != made.num_parts:
            raise ValueError(f"a tensor in {values[0]} parts cannot be held by a group of {made.num_parts} ranks")
        made.orig_size = values[2:2 + values[1]]
        made.orig_device = local_part.device if device is None else torch.device(device)
        made.partition = partition_uniform(math.prod(made.orig_size), made.num_parts)
        expected = made.partition[made.rank + 1] - made.partition[made.rank]
        if local_part.numel() != expected:
            raise ValueError(f"part {made.rank} of a tensor of size {made.orig_size} has {expected} elements, got {local_part.numel()}")
        made.local_data = local_part.detach().reshape(-1)
        return made

    def full(self, device=None):
        """The whole tensor, on every rank (collective)."""
        longest = self.partition[1]  # larger parts come first
        mine = self.local_data.new_zeros(longest)
        mine[:self.local_data.numel()] = self.local_data
        everyone = self.local_data.new_empty(longest * self.num_parts)
        collectives.all_gather_into_tensor(everyone, mine, group=self.group)
        parts = [everyone[part * longest:part * longest + end - begin]
                 for part, (begin, end) in enumerate(zip(self.partition, self.partition[1:]))]
        return torch.cat(parts).view(self.orig_size).to(device or self.orig_device)

    def to_meta(self):
        """[number of parts, number of dimensions, the sizes...]"""
        return torch.tensor([self.num_parts, len(self.orig_size), *self.orig_size], dtype=torch.int64, device=self.orig_device)

    def data(self):
        """This rank's part, one-dimensional."""
        return self.local_data

    def local_size(self):
        return self.local_data.size()

    def full_size(self):
        return self.orig_size
