# SPDX-License-Identifier: Apache-2.0
"""The collectives, with the argument order callers know, on torch.distributed.

Every function also takes `prof`, `log_name` and `debug` for the recorder (deepspeed.comm.recorder). With `async_op` a
work handle with `wait()` and `is_completed()` comes back, otherwise None. Arguments that cannot work are refused before anything
is sent, with the names of the function and the argument. Calls are numbered in the flight record (deepspeed.comm.flight).
"""
import torch
import torch.distributed as dist

from deepspeed.comm import checks
from deepspeed.comm.recorder import recorded
from deepspeed.comm.reduce_op import ReduceOp, to_torch


class _Works:
    """Several works waited for as one, with something to do once they are done."""

    def __init__(self, works, then=None):
        self._works = [work for work in works if work is not None]
        self._then = then

    def is_completed(self):
        return all(work.is_completed() for work in self._works)

    def wait(self, timeout=None):
        for work in self._works:
            work.wait() if timeout is None else work.wait(timeout)
        if self._then is not None:
            self._then, then = None, self._then
            then()
        return True


def _finish(works, async_op, then=None):
    works = _Works(works, then)
    if async_op:
        return works
    works.wait()
    return None


def _is_gloo(tensor, group):
    """Whether the collective on this tensor runs on Gloo."""
    group = group if group is not None else dist.group.WORLD
    return group._get_backend(tensor.device).name() == "gloo"


# --------------------------------------------------------------------------------------------------- one to all, all to one
@recorded(lambda tensor, *_, **__: tensor,
          lambda tensor, src, group=None, *_, **__: (checks.tensor(tensor, "tensor"), checks.rank(src, "src", group)))
def broadcast(tensor, src, group=None, async_op=False):
    return dist.broadcast(tensor, src, group=group, async_op=async_op)


@recorded(lambda *_, **__: (),
          lambda object_list, src, group=None, *_, **__: (checks.objects(object_list, "object_list"), checks.rank(src, "src", group)))
def broadcast_object_list(object_list, src, group=None, device=None):
    return dist.broadcast_object_list(object_list, src=src, group=group, device=device)


@recorded(lambda tensor, *_, **__: tensor,
          lambda tensor, dst, op=ReduceOp.SUM, group=None, *_, **__: (checks.tensor(tensor, "tensor"), checks.op(op),
                                                                      checks.rank(dst, "dst", group)))
def reduce(tensor, dst, op=ReduceOp.SUM, group=None, async_op=False):
    return dist.reduce(tensor, dst, op=to_torch(op), group=group, async_op=async_op)


def _check_gather(tensor, gather_list=None, dst=0, group=None, *_, **__):
    checks.tensor(tensor, "tensor")
    checks.rank(dst, "dst", group)
    if dist.get_rank() == dst:
        checks.one_each(gather_list, "gather_list (on rank dst)", group, tensor)


@recorded(lambda tensor, *_, **__: tensor, _check_gather)
def gather(tensor, gather_list=None, dst=0, group=None, async_op=False):
    return dist.gather(tensor, gather_list, dst=dst, group=group, async_op=async_op)


def _check_scatter(tensor, scatter_list=None, src=0, group=None, *_, **__):
    checks.tensor(tensor, "tensor")
    checks.rank(src, "src", group)
    if dist.get_rank() == src:
        checks.one_each(scatter_list, "scatter_list (on rank src)", group, tensor)


@recorded(lambda tensor, *_, **__: tensor, _check_scatter)
def scatter(tensor, scatter_list=None, src=0, group=None, async_op=False):
    return dist.scatter(tensor, scatter_list, src=src, group=group, async_op=async_op)


# ---------------------------------------------------------------------------------------------------------------- reduce
_check_all_reduce = (lambda tensor, op=ReduceOp.SUM, group=None, *_, **__:
                     (checks.tensor(tensor, "tensor"), checks.op(op), checks.group(group)))


@recorded(lambda tensor, *_, **__: tensor, _check_all_reduce)
def all_reduce(tensor, op=ReduceOp.SUM, group=None, async_op=False):
    return dist.all_reduce(tensor, op=to_torch(op), group=group, async_op=async_op)


@recorded(lambda tensor, *_, **__: tensor, _check_all_reduce)
def inference_all_reduce(tensor, op=ReduceOp.SUM, group=None, async_op=False):
    return dist.all_reduce(tensor, op=to_torch(op), group=group, async_op=async_op)


@recorded(lambda tensors, *_, **__: tensors,
          lambda tensors, op=ReduceOp.SUM, group=None, *_, **__: (checks.tensors(tensors, "tensors"), checks.op(op), checks.group(group)))
def all_reduce_coalesced(tensors, op=ReduceOp.SUM, group=None, async_op=False):
    """All-reduces every tensor of the list, in place, with all of them under way together."""
    return _finish([dist.all_reduce(tensor, op=to_torch(op), group=group, async_op=True) for tensor in tensors], async_op)


def _check_reduce_scatter(output, input_list, op=ReduceOp.SUM, group=None, *_, **__):
    checks.tensor(output, "output")
    checks.op(op)
    checks.one_each(input_list, "input_list", group, output)


@recorded(lambda output, input_list, *_, **__: input_list, _check_reduce_scatter)
def reduce_scatter(output, input_list, op=ReduceOp.SUM, group=None, async_op=False):
    return dist.reduce_scatter(output, list(input_list), op=to_torch(op), group=group, async_op=async_op)


@recorded(lambda output_tensor, tensor, *_, **__: tensor,
          lambda output_tensor, tensor, op=ReduceOp.SUM, group=None, *_, **__:
          (checks.op(op), checks.whole(tensor, "tensor", output_tensor, "output_tensor", group)))
def reduce_scatter_tensor(output_tensor, tensor, op=ReduceOp.SUM, group=None, async_op=False):
    return dist.reduce_scatter_tensor(output_tensor, tensor, op=to_torch(op), group=group, async_op=async_op)


def reduce_scatter_fn(output_tensor, tensor, op=ReduceOp.SUM, group=None, async_op=False, **recording):
    return reduce_scatter_tensor(output_tensor, tensor, op=op, group=group, async_op=async_op, **recording)


# ---------------------------------------------------------------------------------------------------------------- gather
@recorded(lambda tensor_list, tensor, *_, **__: tensor_list,
          lambda tensor_list, tensor, group=None, *_, **__: (checks.tensor(tensor, "tensor"),
                                                             checks.one_each(tensor_list, "tensor_list", group, tensor)))
def all_gather(tensor_list, tensor, group=None, async_op=False):
    return dist.all_gather(tensor_list, tensor, group=group, async_op=async_op)


@recorded(lambda *_, **__: (),
          lambda object_list, obj, group=None, *_, **__: (checks.group(group),
                                                          checks.objects(object_list, "object_list", checks.size_of(group))))
def all_gather_object(object_list, obj, group=None):
    return dist.all_gather_object(object_list, obj, group=group)


@recorded(lambda output_tensor, tensor, *_, **__: output_tensor,
          lambda output_tensor, tensor, group=None, *_, **__: checks.whole(output_tensor, "output_tensor", tensor, "tensor", group))
def all_gather_into_tensor(output_tensor, tensor, group=None, async_op=False):
    return dist.all_gather_into_tensor(output_tensor, tensor, group=group, async_op=async_op)


def allgather_fn(output_tensor, input_tensor, group=None, async_op=False, **recording):
    return all_gather_into_tensor(output_tensor, input_tensor, group=group, async_op=async_op, **recording)


def _check_all_gather_coalesced(output_tensors, input_tensors, group=None, *_, **__):
    checks.tensors(output_tensors, "output_tensors")
    checks.tensors(input_tensors, "input_tensors")
    if len(output_tensors) != len(input_tensors):
        raise ValueError(f"{len(output_tensors)} output_tensors for {len(input_tensors)} input_tensors")
    for index, (output, given) in enumerate(zip(output_tensors, input_tensors)):
        checks.whole(output, f"output_tensors[{index}]", given, f"input_tensors[{index}]", group)


@recorded(lambda output_tensors, input_tensors, *_, **__: output_tensors, _check_all_gather_coalesced)
def all_gather_coalesced(output_tensors, input_tensors, group=None, async_op=False):
    """output_tensors[i] becomes the concatenation of every rank's input_tensors[i]; all of them under way together."""
    works = [dist.all_gather_into_tensor(out, mine, group=group, async_op=True)
             for out, mine in zip(output_tensors, input_tensors)]
    return _finish(works, async_op)


# ------------------------------------------------------------------------------------------------------------- all to all
@recorded(lambda output, tensor, *_, **__: tensor,
          lambda output, tensor, output_split_sizes=None, input_split_sizes=None, group=None, *_, **__:
          checks.splits(output, tensor, output_split_sizes, input_split_sizes, group))
def all_to_all_single(output, tensor, output_split_sizes=None, input_split_sizes=None, group=None, async_op=False):
    return dist.all_to_all_single(output, tensor, output_split_sizes=output_split_sizes, input_split_sizes=input_split_sizes,
                                  group=group, async_op=async_op)


def _check_all_to_all(output_tensor_list, input_tensor_list, group=None, *_, **__):
    checks.one_each(input_tensor_list, "input_tensor_list", group, None)
    like = input_tensor_list[0] if input_tensor_list else None
    checks.one_each(input_tensor_list, "input_tensor_list", group, like)
    checks.one_each(output_tensor_list, "output_tensor_list", group, like)


@recorded(lambda output_tensor_list, input_tensor_list, *_, **__: input_tensor_list, _check_all_to_all)
def all_to_all(output_tensor_list, input_tensor_list, group=None, async_op=False):
    if _is_gloo(input_tensor_list[0], group):
        return _all_to_all_by_single(output_tensor_list, input_tensor_list, group, async_op)
    return dist.all_to_all(output_tensor_list, input_tensor_list, group=group, async_op=async_op)


def _all_to_all_by_single(outputs, inputs, group, async_op):
    """Gloo has no all-to-all of lists: one flat exchange, then the parts are copied out."""
    flat_in = torch.cat([tensor.reshape(-1) for tensor in inputs])
    flat_out = flat_in.new_empty(sum(tensor.numel() for tensor in outputs))
    sizes = [tensor.numel() for tensor in outputs]
    work = dist.all_to_all_single(flat_out, flat_in, sizes, [tensor.numel() for tensor in inputs], group=group, async_op=True)

    def copy_out():
        for tensor, part in zip(outputs, flat_out.split(sizes)):
            tensor.copy_(part.view_as(tensor))

    return _finish([work], async_op, copy_out)


# ---------------------------------------------------------------------------------------------------------- one to another
def _check_send(tensor, dst, group=None, *_, **__):
    checks.tensor(tensor, "tensor")
    checks.peer(dst, "dst", group)


def _check_recv(tensor, src=None, group=None, *_, **__):
    checks.tensor(tensor, "tensor")
    checks.peer(src, "src", group, none_ok=True)


def _to(tensor, dst, *_, **__):
    return f"to rank {dst}"


def _from(tensor, src=None, *_, **__):
    return "from any rank" if src is None else f"from rank {src}"


@recorded(lambda tensor, *_, **__: tensor, _check_send, _to)
def send(tensor, dst, group=None, tag=0):
    return dist.send(tensor, dst, group=group, tag=tag)


@recorded(lambda tensor, *_, **__: tensor, _check_recv, _from)
def recv(tensor, src=None, group=None, tag=0):
    return dist.recv(tensor, src, group=group, tag=tag)


@recorded(lambda tensor, *_, **__: tensor, _check_send, _to)
def isend(tensor, dst, group=None, tag=0):
    return dist.isend(tensor, dst, group=group, tag=tag)


@recorded(lambda tensor, *_, **__: tensor, _check_recv, _from)
def irecv(tensor, src=None, group=None, tag=0):
    return dist.irecv(tensor, src, group=group, tag=tag)


class P2POp(dist.P2POp):
    """torch's P2POp that also takes this module's isend and irecv. `peer` is a global rank."""

    def __new__(cls, op, tensor, peer=None, group=None, tag=0):
        if _torch_p2p(op) not in (dist.isend, dist.irecv):
            raise ValueError(f"P2POp: op must be isend or irecv, got {getattr(op, '__name__', op)!r}")
        checks.tensor(tensor, "P2POp: tensor")
        checks.peer(peer, "P2POp: peer", group)
        return super().__new__(cls, _torch_p2p(op), tensor, peer, group, tag)

    def __init__(self, op, tensor, peer=None, group=None, tag=0):
        super().__init__(_torch_p2p(op), tensor, peer, group, tag)


def _torch_p2p(op):
    return {isend: dist.isend, irecv: dist.irecv}.get(op, op)


def _check_batch(p2p_op_list):
    if not isinstance(p2p_op_list, (list, tuple)) or not p2p_op_list:
        raise ValueError("p2p_op_list must be a list of at least one P2POp")
    for index, item in enumerate(p2p_op_list):
        if not isinstance(item, dist.P2POp):
            raise TypeError(f"p2p_op_list[{index}] must be a P2POp, got {type(item).__name__}")


@recorded(lambda p2p_op_list, *_, **__: [op.tensor for op in p2p_op_list], _check_batch)
def batch_isend_irecv(p2p_op_list):
    return dist.batch_isend_irecv(p2p_op_list)


# ---------------------------------------------------------------------------------------------------------------- barriers
@recorded(lambda *_, **__: (), lambda group=None, *_, **__: checks.group(group))
def barrier(group=None, async_op=False, device_ids=None):
    return dist.barrier(group=group, async_op=async_op, device_ids=device_ids)


@recorded(lambda *_, **__: (), lambda group=None, *_, **__: checks.group(group))
def monitored_barrier(group=None, timeout=None, wait_all_ranks=False):
    """A barrier that names the ranks that did not come in time (Gloo); a plain one on other backends."""
    if dist.get_backend(group) == "gloo":
        return dist.monitored_barrier(group=group, timeout=timeout, wait_all_ranks=wait_all_ranks)
    return dist.barrier(group=group)


# -------------------------------------------------------------------------------------------------------------- predicates
def has_all_gather_into_tensor():
    return True


def has_reduce_scatter_tensor():
    return True


def has_all_reduce_coalesced():
    return True


def has_coalescing_manager():
    return hasattr(dist.distributed_c10d, "_coalescing_manager")
