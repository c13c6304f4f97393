# SPDX-License-Identifier: Apache-2.0
"""What cannot work is refused by name before anything is sent; and every function against plain torch.distributed on three ranks,
on a group that leaves one of them out."""
import pytest
import torch
import torch.distributed as torch_dist

from deepspeed import comm as dist
from deepspeed.comm import flight
from tests.parity.launch import on_ranks

T = torch.ones


def refused():
    """(function, arguments, what the message says)."""
    pair = [T(2), T(2)]
    return [
        (dist.broadcast, ([1], 0), TypeError, "broadcast: tensor must be a tensor, got list"),
        (dist.broadcast, (T(2), 2), ValueError, r"broadcast: src is rank 2, which is not in the group of ranks \[0, 1\]"),
        (dist.broadcast, (T(2), "0"), TypeError, "broadcast: src must be the number of a rank, got '0'"),
        (dist.broadcast, (T(2),), TypeError, "missing a required argument: 'src'"),
        (dist.broadcast_object_list, ((1,), 0), TypeError, "broadcast_object_list: object_list must be a list"),
        (dist.reduce, (T(2), -1), ValueError, "reduce: dst is rank -1"),
        (dist.reduce, (T(2), 0, "sum"), TypeError, "reduce: op must be a ReduceOp, got 'sum'"),
        (dist.all_reduce, (T(2), dist.ReduceOp.UNUSED), ValueError, "all_reduce: ReduceOp.UNUSED"),
        (dist.all_reduce, (T(2), dist.ReduceOp.SUM, 3), TypeError, "all_reduce: group must be a process group or None, got int"),
        (dist.inference_all_reduce, (None,), TypeError, "inference_all_reduce: tensor must be"),
        (dist.all_reduce_coalesced, (T(2),), TypeError, "all_reduce_coalesced: tensors must be a list"),
        (dist.gather, (T(2), [T(2)], torch_dist.get_rank()), ValueError, r"gather: gather_list \(on rank dst\) has 1 tensors, the group"),
        (dist.scatter, (T(2), None, torch_dist.get_rank()), TypeError, r"scatter: scatter_list \(on rank src\) must be a list"),
        (dist.reduce_scatter, (T(2), [T(2)]), ValueError, "reduce_scatter: input_list has 1 tensors, the group has 2 ranks"),
        (dist.reduce_scatter, (T(2), [T(2), T(2).double()]), ValueError, r"input_list\[1\] is torch.float64, the other side is"),
        (dist.reduce_scatter_tensor, (T(2), T(5)), ValueError, "tensor has 5 elements, but output_tensor has 2 on each of 2 ranks"),
        (dist.reduce_scatter_fn, (T(2), T(5)), ValueError, "reduce_scatter_tensor: tensor has 5"),
        (dist.all_gather, ([T(2)], T(2)), ValueError, "all_gather: tensor_list has 1 tensors"),
        (dist.all_gather_into_tensor, (T(3), T(2)), ValueError, "output_tensor has 3 elements, but tensor has 2 on each of 2 ranks"),
        (dist.allgather_fn, (T(4).half(), T(2)), ValueError, "output_tensor is torch.float16, tensor is torch.float32"),
        (dist.all_gather_object, ([None], 1), ValueError, "all_gather_object: object_list has 1 places, the group has 2 ranks"),
        (dist.all_gather_coalesced, (pair, pair), ValueError, r"output_tensors\[0\] has 2 elements"),
        (dist.all_gather_coalesced, (pair, [T(1)]), ValueError, "2 output_tensors for 1 input_tensors"),
        (dist.all_to_all_single, (T(3), T(4)), ValueError, "output_split_sizes is not given, and 3 rows cannot be cut into 2 equal parts"),
        (dist.all_to_all_single, (T(4), T(4), [1, 2], None), ValueError, r"output_split_sizes is \[1, 2\]: it must be 2 numbers that add up"),
        (dist.all_to_all, (pair, [T(2)]), ValueError, "all_to_all: input_tensor_list has 1 tensors"),
        (dist.send, (T(2), torch_dist.get_rank()), ValueError, "send: dst is rank . this rank itself"),
        (dist.recv, (T(2), 5), ValueError, "recv: src is rank 5, which is not in the group"),
        (dist.isend, (3, 0), TypeError, "isend: tensor must be a tensor, got int"),
        (dist.irecv, (T(2), 1.0), TypeError, "irecv: src must be the number of a rank, got 1.0"),
        (dist.P2POp, (dist.all_reduce, T(2), 0), ValueError, "P2POp: op must be isend or irecv, got 'all_reduce'"),
        (dist.P2POp, (dist.isend, T(2), 7), ValueError, "P2POp: peer is rank 7"),
        (dist.batch_isend_irecv, ([],), ValueError, "batch_isend_irecv: p2p_op_list must be a list of at least one P2POp"),
        (dist.batch_isend_irecv, ([dist.isend],), TypeError, r"p2p_op_list\[0\] must be a P2POp, got function"),
        (dist.barrier, ("world",), TypeError, "barrier: group must be a process group or None, got str"),
        (dist.monitored_barrier, (1,), TypeError, "monitored_barrier: group must be"),
    ]


@on_ranks(2)
def test_bad_arguments_are_refused_by_name_and_send_nothing():
    dist.barrier()
    before = flight.events()
    for function, args, kind, message in refused():
        with pytest.raises(kind, match=message.replace("rank . this", "rank ., this")):
            function(*args)
    assert flight.events() == before
    dist.barrier()


def both(name, *args, output=None, **kwargs):
    """Calls deepspeed.comm's function and torch's on copies; the tensors given must end up equal."""
    ours, theirs = [torch.utils._pytree.tree_map_only(torch.Tensor, torch.clone, args) for _ in range(2)]
    getattr(dist, name)(*ours, **kwargs)
    getattr(torch_dist, name)(*theirs, **kwargs)
    flat = torch.utils._pytree.tree_leaves
    for a, b in zip(flat(ours), flat(theirs)):
        if isinstance(a, torch.Tensor):
            assert torch.equal(a, b), name
        else:
            assert a == b, name


@on_ranks(3)
def test_every_function_does_what_torch_does():
    rank = torch_dist.get_rank()
    pair = dist.new_group([0, 2])
    for group, n, other in ((None, 3, 1), (pair, 2, 2)):
        if rank not in dist.get_all_ranks_from_group(group):
            continue
        x = torch.arange(6.0) * (rank + 1)
        empty = torch.zeros(6)
        for op in (torch_dist.ReduceOp.SUM, torch_dist.ReduceOp.MAX, torch_dist.ReduceOp.MIN, torch_dist.ReduceOp.PRODUCT):
            both("all_reduce", x, op=op, group=group)
        both("broadcast", x, other, group=group)
        both("reduce", x if rank == 0 else x, 0, group=group) if rank == 0 else _reduce_elsewhere(x, group)
        both("all_gather", [empty.clone() for _ in range(n)], x, group=group)
        both("all_gather_into_tensor", torch.zeros(6 * n), x, group=group)
        both("reduce_scatter_tensor", torch.zeros(2), torch.arange(2.0 * n) + rank, group=group)
        both("reduce_scatter", torch.zeros(2), [T(2) * (rank + i) for i in range(n)], group=group)
        both("all_to_all_single", torch.zeros(2 * n), torch.arange(2.0 * n) + 10 * rank, group=group)
        both("gather", x, [empty.clone() for _ in range(n)] if rank == other else None, other, group=group)
        both("scatter", empty, [x + i for i in range(n)] if rank == other else None, other, group=group)
        both("all_gather_object", [None] * n, {"rank": rank}, group=group)
        both("broadcast_object_list", [rank, "x"], other, group=group)
        both("barrier", group=group)
    if rank == 0:
        both("send", T(3), 2)
        both("send", T(3), 2, group=pair, tag=4)
    elif rank == 2:
        both("recv", torch.zeros(3), 0)
        both("recv", torch.zeros(3), 0, group=pair, tag=4)
    both("monitored_barrier")
    assert dist.get_rank(pair) == torch_dist.get_rank(pair) and dist.get_world_size(pair) == torch_dist.get_world_size(pair)
    assert dist.get_all_ranks_from_group(pair) == [0, 2] if rank != 1 else dist.get_rank(pair) == -1
    assert dist.get_global_rank(pair, 1) == 2 if rank != 1 else True


def _reduce_elsewhere(x, group):
    """Where the result does not go, Gloo leaves what it likes in the tensor."""
    dist.reduce(x.clone(), 0, group=group)
    torch_dist.reduce(x.clone(), 0, group=group)


@on_ranks(2)
def test_a_group_that_this_rank_is_not_in():
    alone = dist.new_group([1])
    x = T(2) * 3
    dist.all_reduce(x, group=alone)  # rank 0 is outside: torch ignores its call, and so do we
    assert x.tolist() == [3.0, 3.0]
    dist.barrier()
