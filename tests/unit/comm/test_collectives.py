# SPDX-License-Identifier: Apache-2.0
"""Each collective on two ranks against what it must give, synchronous and not."""
import pytest
import torch
import torch.distributed as torch_dist

from deepspeed import comm as dist
from tests.parity.launch import on_ranks


def mine(n=3):
    """Rank r holds r + 1, r + 2, ... so that every element tells where it came from."""
    return torch.arange(n, dtype=torch.float32) + 10 * dist.get_rank()


ZERO, ONE = torch.arange(3.0), torch.arange(3.0) + 10


def finish(work, async_op):
    assert (work is None) != async_op
    if async_op:
        assert work.wait() in (True, None)


@on_ranks(2)
@pytest.mark.parametrize("async_op", [False, True])
def test_reductions(async_op):
    for op, expected in [(dist.ReduceOp.SUM, ZERO + ONE), (dist.ReduceOp.MAX, ONE), (dist.ReduceOp.MIN, ZERO),
                         (dist.ReduceOp.PRODUCT, ZERO * ONE), (dist.ReduceOp.AVG, (ZERO + ONE) / 2),
                         (torch_dist.ReduceOp.SUM, ZERO + ONE)]:
        x = mine()
        finish(dist.all_reduce(x, op=op, async_op=async_op), async_op)
        assert torch.equal(x, expected), op
    x = mine()
    finish(dist.inference_all_reduce(x, async_op=async_op), async_op)
    assert torch.equal(x, ZERO + ONE)
    tensors = [mine(), mine(5)]
    finish(dist.all_reduce_coalesced(tensors, async_op=async_op), async_op)
    assert torch.equal(tensors[0], ZERO + ONE) and tensors[1].tolist() == [10.0, 12.0, 14.0, 16.0, 18.0]
    x = mine()
    finish(dist.reduce(x, 1, async_op=async_op), async_op)
    assert dist.get_rank() == 0 or torch.equal(x, ZERO + ONE)


@on_ranks(2)
@pytest.mark.parametrize("async_op", [False, True])
def test_reduce_scatter(async_op):
    rank = dist.get_rank()
    both = torch.cat([mine(), mine() + 1])
    expected = ZERO + ONE + 2 * rank
    for scatter in (dist.reduce_scatter_tensor, dist.reduce_scatter_fn):
        out = torch.empty(3)
        finish(scatter(out, both, async_op=async_op), async_op)
        assert torch.equal(out, expected)
    out = torch.empty(3)
    finish(dist.reduce_scatter(out, [mine(), mine() + 1], async_op=async_op), async_op)
    assert torch.equal(out, expected)


@on_ranks(2)
@pytest.mark.parametrize("async_op", [False, True])
def test_gathers(async_op):
    for gather in (dist.all_gather_into_tensor, dist.allgather_fn):
        out = torch.empty(6)
        finish(gather(out, mine(), async_op=async_op), async_op)
        assert torch.equal(out, torch.cat([ZERO, ONE]))
    parts = [torch.empty(3), torch.empty(3)]
    finish(dist.all_gather(parts, mine(), async_op=async_op), async_op)
    assert torch.equal(parts[0], ZERO) and torch.equal(parts[1], ONE)
    outs = [torch.empty(6), torch.empty(2)]
    finish(dist.all_gather_coalesced(outs, [mine(), mine(1)], async_op=async_op), async_op)
    assert torch.equal(outs[0], torch.cat([ZERO, ONE])) and outs[1].tolist() == [0.0, 10.0]
    objects = [None, None]
    dist.all_gather_object(objects, {"rank": dist.get_rank()})
    assert objects == [{"rank": 0}, {"rank": 1}]
    collected = [torch.empty(3), torch.empty(3)] if dist.get_rank() == 1 else None
    finish(dist.gather(mine(), collected, dst=1, async_op=async_op), async_op)
    assert collected is None or (torch.equal(collected[0], ZERO) and torch.equal(collected[1], ONE))


@on_ranks(2)
@pytest.mark.parametrize("async_op", [False, True])
def test_from_one_to_all(async_op):
    x = mine()
    finish(dist.broadcast(x, 1, async_op=async_op), async_op)
    assert torch.equal(x, ONE)
    out = torch.empty(3)
    finish(dist.scatter(out, [ZERO, ONE] if dist.get_rank() == 0 else None, src=0, async_op=async_op), async_op)
    assert torch.equal(out, (ZERO, ONE)[dist.get_rank()])
    objects = [dist.get_rank()]
    dist.broadcast_object_list(objects, src=1)
    assert objects == [1]


@on_ranks(2)
@pytest.mark.parametrize("async_op", [False, True])
def test_all_to_all(async_op):
    rank = dist.get_rank()
    out = torch.empty(4)
    finish(dist.all_to_all_single(out, mine(4), async_op=async_op), async_op)
    assert out.tolist() == ([0.0, 1.0, 10.0, 11.0] if rank == 0 else [2.0, 3.0, 12.0, 13.0])
    # rank r sends 1 + r elements to rank 0 and a 2 x 2 block to rank 1
    inputs = [mine(1 + rank), mine(4).view(2, 2)]
    outputs = [torch.empty(1), torch.empty(2)] if rank == 0 else [torch.empty(2, 2), torch.empty(2, 2)]
    finish(dist.all_to_all(outputs, inputs, async_op=async_op), async_op)
    expected = [[0.0], [10.0, 11.0]] if rank == 0 else [[[0.0, 1.0], [2.0, 3.0]], [[10.0, 11.0], [12.0, 13.0]]]
    assert [tensor.tolist() for tensor in outputs] == expected
    out = torch.empty(2 if rank == 0 else 4)
    sizes = [1, 1] if rank == 0 else [2, 2]
    finish(dist.all_to_all_single(out, mine(3), sizes, [1, 2], async_op=async_op), async_op)
    assert out.tolist() == ([0.0, 10.0] if rank == 0 else [1.0, 2.0, 11.0, 12.0])


@on_ranks(2)
def test_point_to_point():
    rank, peer, other = dist.get_rank(), 1 - dist.get_rank(), torch.empty(3)
    if rank == 0:
        dist.send(mine(), 1, tag=3)
        dist.isend(mine(), 1).wait()
    else:
        dist.recv(other, 0, tag=3)
        assert torch.equal(other, ZERO)
        dist.irecv(other.zero_(), 0).wait()
        assert torch.equal(other, ZERO)
    for isend, irecv in ((dist.isend, dist.irecv), (torch_dist.isend, torch_dist.irecv)):
        other.zero_()
        for work in dist.batch_isend_irecv([dist.P2POp(isend, mine(), peer), dist.P2POp(irecv, other, peer)]):
            work.wait()
        assert torch.equal(other, (ONE, ZERO)[rank])


@on_ranks(2)
def test_barriers_and_groups():
    dist.barrier()
    dist.monitored_barrier()
    work = dist.barrier(async_op=True)
    work.wait()
    group = dist.new_group([0, 1])
    x = mine()
    dist.all_reduce(x, group=group)
    assert torch.equal(x, ZERO + ONE)


def test_names_in_both_modules():
    assert dist.comm.all_reduce is dist.all_reduce and dist.comm.init_distributed is dist.init_distributed
    assert dist.has_all_gather_into_tensor() and dist.has_reduce_scatter_tensor() and dist.has_all_reduce_coalesced()
    assert dist.has_coalescing_manager()
    with pytest.raises(ValueError, match="UNUSED"):
        dist.all_reduce(torch.ones(1), op=dist.ReduceOp.UNUSED)


@on_ranks(2)
def test_torch_backend_object():
    backend = dist.torch.TorchBackend("gloo")
    x = mine()
    backend.all_reduce(x)
    assert torch.equal(x, ZERO + ONE) and backend.get_world_size() == 2 and backend.is_initialized()
    with pytest.raises(AttributeError, match="no_such_collective"):
        backend.no_such_collective
