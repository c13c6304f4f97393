# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from deepspeed import comm as dist
from deepspeed.runtime.utils import PartitionedTensor
from tests.parity.launch import on_ranks


@on_ranks(2)
@pytest.mark.parametrize("shape", [(4,), (3, 5), (1,), (), (2, 0)])
def test_parts_make_the_whole(shape):
    whole = torch.randn(shape)
    dist.broadcast(whole, 0)
    part = PartitionedTensor(whole, dist.get_world_group())
    assert part.data().dim() == 1 and abs(part.data().numel() * 2 - whole.numel()) <= 1
    assert torch.equal(part.full(), whole) and part.full_size() == list(shape) and part.local_size() == part.data().size()
    again = PartitionedTensor.from_meta(part.to_meta(), part.data(), dist.get_world_group())
    assert torch.equal(again.full(), whole)
    assert dist.get_rank() or part.data().data_ptr() != whole.data_ptr() or not whole.numel()


@on_ranks(2)
def test_foreign_meta_is_refused():
    meta = PartitionedTensor(torch.ones(4), dist.get_world_group()).to_meta()
    with pytest.raises(ValueError, match="has 2 elements, got 3"):
        PartitionedTensor.from_meta(meta, torch.ones(3), dist.get_world_group())
    meta[0] = 3
    with pytest.raises(ValueError, match="in 3 parts cannot be held by a group of 2"):
        PartitionedTensor.from_meta(meta, torch.ones(2), dist.get_world_group())
