# SPDX-License-Identifier: Apache-2.0
"""Arguments of the collectives, refused by name before anything is sent: a rank that sends something else than the others, or
nothing at all, makes those wait. Messages begin with the name of the function, which the caller of these checks adds."""
import torch
import torch.distributed as dist

from deepspeed.comm.reduce_op import to_torch


def tensor(value, name):
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")


def group(value):
    if value is not None and not isinstance(value, dist.ProcessGroup) and value is not dist.GroupMember.NON_GROUP_MEMBER:
        raise TypeError(f"group must be a process group or None, got {type(value).__name__}")


def size_of(process_group):
    return dist.get_world_size(process_group)


def _outside(process_group):
    return process_group is dist.GroupMember.NON_GROUP_MEMBER or size_of(process_group) < 1


def rank(value, name, process_group, none_ok=False):
    """A global rank that is in the group."""
    group(process_group)
    if value is None and none_ok:
        return
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be the number of a rank, got {value!r}")
    if _outside(process_group):
        return  # torch ignores or refuses the call of a rank outside of the group
    ranks = dist.get_process_group_ranks(process_group if process_group is not None else dist.group.WORLD)
    if value not in ranks:
        raise ValueError(f"{name} is rank {value}, which is not in the group of ranks {ranks}")


def peer(value, name, process_group, none_ok=False):
    rank(value, name, process_group, none_ok)
    if value is not None and value == dist.get_rank():
        raise ValueError(f"{name} is rank {value}, this rank itself")


def op(value):
    if not isinstance(to_torch(value), (dist.ReduceOp, dist.ReduceOp.RedOpType)):
        raise TypeError(f"op must be a ReduceOp, got {value!r}")


def tensors(value, name, count=None, like=None):
    """A list of tensors; `count` of them; of the dtype of `like`."""
    if isinstance(value, torch.Tensor) or not isinstance(value, (list, tuple)):
        raise TypeError(f"{name} must be a list of tensors, got {type(value).__name__}")
    for index, item in enumerate(value):
        tensor(item, f"{name}[{index}]")
        if like is not None and item.dtype != like.dtype:
            raise ValueError(f"{name}[{index}] is {item.dtype}, the other side is {like.dtype}")
    if count is not None and len(value) != count:
        raise ValueError(f"{name} has {len(value)} tensors, the group has {count} ranks")


def one_each(value, name, process_group, like):
    """One tensor for each rank of the group, together of the group's size times the elements of `like`."""
    group(process_group)
    tensors(value, name, None if _outside(process_group) else size_of(process_group), like)


def whole(large, large_name, small, small_name, process_group):
    """`large` holds one `small` for each rank."""
    tensor(large, large_name)
    tensor(small, small_name)
    group(process_group)
    if large.dtype != small.dtype:
        raise ValueError(f"{large_name} is {large.dtype}, {small_name} is {small.dtype}")
    if not _outside(process_group) and large.numel() != small.numel() * size_of(process_group):
        raise ValueError(f"{large_name} has {large.numel()} elements, but {small_name} has {small.numel()} on each of "
                         f"{size_of(process_group)} ranks")


def splits(output, given, output_sizes, input_sizes, process_group):
    tensor(output, "output")
    tensor(given, "tensor")
    group(process_group)
    if _outside(process_group):
        return
    n = size_of(process_group)
    if output.dtype != given.dtype:
        raise ValueError(f"output is {output.dtype}, tensor is {given.dtype}")
    for name, sizes, side in (("output_split_sizes", output_sizes, output), ("input_split_sizes", input_sizes, given)):
        rows = side.shape[0] if side.dim() else 1
        if not sizes:
            if rows % n:
                raise ValueError(f"{name} is not given, and {rows} rows cannot be cut into {n} equal parts")
            continue
        if len(sizes) != n or any(size < 0 for size in sizes) or sum(sizes) != rows:
            raise ValueError(f"{name} is {list(sizes)}: it must be {n} numbers that add up to {rows} rows")


def objects(value, name, count=None):
    if not isinstance(value, list):
        raise TypeError(f"{name} must be a list, got {type(value).__name__}")
    if count is not None and count > 0 and len(value) < count:
        raise ValueError(f"{name} has {len(value)} places, the group has {count} ranks")
