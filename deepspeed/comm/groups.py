# SPDX-License-Identifier: Apache-2.0
"""Who shares data, tensors, sequences and experts with whom. Import path users have: deepspeed.utils.groups.

Note [Who decides a group]: asked for a group, this module looks at (1) the caller's `mpu` object, as Megatron has it, (2) the
device mesh with dimensions "data_parallel", "sequence_parallel", "tensor_parallel", (3) the groups made here by the `_create_*`
functions, and (4) falls back on the whole world for data and on one rank for everything else. `mpu` and `mesh_device` are
assigned by the engine or the caller; a `None` means there is none.

Note [Sequence and data]: ranks that share a sequence hold the same parameters, so gradients are reduced over data times
sequence ranks: that product is the "sequence data" group. Without sequence parallelism it is the data group.
"""
from typing import NamedTuple

import torch.distributed as dist

from deepspeed.comm import process_group as pg
from deepspeed.telemetry.logs import log_dist

mpu = None
mesh_device = None
expert_tensor_parallel_world_size = 1


class _Made:
    """Groups made by this module, by kind. They end with the world they were cut from."""

    def __init__(self):
        self.reset()

    def reset(self):
        self.tensor = None
        self.data = None
        self.world_clone = None
        self.zero_intra = None
        self.expert = {}
        self.expert_data = {}
        self.tensor_size_override = None
        self.tensor_rank_override = None


_made = _Made()


def _forget_all():
    """As at start: nothing is made parallel."""
    global mpu, mesh_device
    mpu = mesh_device = None
    _made.reset()


pg.on_destroy(_forget_all)


# ------------------------------------------------------------------------------------------- which ranks: pure integers
class Split(NamedTuple):
    inner: list  # groups of consecutive ranks
    outer: list  # groups of ranks with the same place in their inner group


def split_ranks(ranks, inner_size, what):
    """Cuts `ranks` into consecutive groups of `inner_size`, and across them."""
    if inner_size < 1 or len(ranks) % inner_size:
        raise ValueError(f"{what} of {inner_size} does not divide {len(ranks)} ranks")
    inner = [list(ranks[start:start + inner_size]) for start in range(0, len(ranks), inner_size)]
    return Split(inner, [list(column) for column in zip(*inner)])


def expert_ranks(world_size, tensor_size, expert_size, use_data_before_expert=False):
    """Expert groups (inner) and expert-data groups (outer) of a world whose tensor groups are consecutive ranks.

    Ranks with the same tensor rank form a data group; it is cut into expert groups of neighbours, or, with
    `use_data_before_expert`, into expert groups whose members stand as far apart as possible.
    """
    data_groups = split_ranks(range(world_size), tensor_size, "a tensor parallel size").outer
    inner, outer = [], []
    for group in data_groups:
        if use_data_before_expert:
            if len(group) % expert_size:
                raise ValueError(f"an expert parallel size of {expert_size} does not divide {len(group)} ranks")
            cut = split_ranks(group, len(group) // expert_size, "a number of expert replicas")
            cut = Split(cut.outer, cut.inner)
        else:
            cut = split_ranks(group, expert_size, "an expert parallel size")
        inner += cut.inner
        outer += cut.outer
    return Split(inner, outer)


def _make(rank_lists):
    """Creates all these groups (collective) and returns the one this rank is in."""
    me, mine = dist.get_rank(), None
    for ranks in rank_lists:
        group = dist.new_group(ranks)
        if me in ranks:
            mine = group
    return mine


# ----------------------------------------------------------------------------------------------------------- creating
def initialize(ep_size=1, mpu=None):
    """Old name: expert groups now belong to the model's MoE layers. Remembers `mpu` and makes the groups of size `ep_size`."""
    if mpu is not None:
        globals()["mpu"] = mpu
        _create_expert_data_and_model_parallel(ep_size, mpu)
    else:
        _create_expert_and_data_parallel(ep_size)


def _create_model_parallel(model_parallel_size_):
    """(data group, tensor group): consecutive ranks share tensors."""
    pg._require("_create_model_parallel")
    split = split_ranks(range(dist.get_world_size()), model_parallel_size_, "a model parallel size")
    _made.tensor, _made.data = _make(split.inner), _make(split.outer)
    return _made.data, _made.tensor


def _create_expert_and_data_parallel(expert_parallel_size_, use_data_before_expert_parallel_=False):
    pg._require("_create_expert_and_data_parallel")
    _create_experts(1, expert_parallel_size_, use_data_before_expert_parallel_)


def _create_expert_data_and_model_parallel(expert_parallel_size_, mpu, use_data_before_expert_parallel_=False):
    pg._require("_create_expert_data_and_model_parallel")
    _create_experts(_size_of_mpu(mpu, "tensor_model_parallel", "model_parallel"), expert_parallel_size_,
                    use_data_before_expert_parallel_)


def _create_experts(tensor_size, expert_size, use_data_before_expert):
    name = f"ep_size_{expert_size}"
    if name in _made.expert:
        return
    split = expert_ranks(dist.get_world_size(), tensor_size, expert_size, use_data_before_expert)
    _made.expert[name], _made.expert_data[name] = _make(split.inner), _make(split.outer)
    log_dist(f"expert parallel groups {name}: {split.inner}, their replicas: {split.outer}")


def _init_tp_mesh_device(tensor_model_parallel_size=1, data_parallel_size=None):
    """(data group, tensor group) cut from a mesh of data x tensor."""
    global mesh_device
    pg._require("_init_tp_mesh_device")
    if data_parallel_size is None:
        split_ranks(range(dist.get_world_size()), tensor_model_parallel_size, "a tensor parallel size")
        data_parallel_size = dist.get_world_size() // tensor_model_parallel_size
    mesh_device = pg.initialize_mesh_device((data_parallel_size, tensor_model_parallel_size), ("data_parallel", "tensor_parallel"))
    _made.tensor, _made.data = mesh_device.get_group("tensor_parallel"), mesh_device.get_group("data_parallel")
    return _made.data, _made.tensor


def _create_zero_param_parallel_group(group_size):
    """The group of neighbours that keeps a second partition of the parameters (hybrid sharding)."""
    pg._require("_create_zero_param_parallel_group")
    split = split_ranks(range(dist.get_world_size()), group_size, "a zero_hpz_partition_size")
    _made.zero_intra = _make(split.inner)


def _clone_world_group():
    """A second group of all ranks, so that its collectives do not queue behind the world's."""
    pg._require("_clone_world_group")
    if _made.world_clone is None:
        _made.world_clone = dist.new_group(list(range(dist.get_world_size())))
    return _made.world_clone


# -------------------------------------------------------------------------------------------------------------- finding
def _mpu_method(source, *kinds, what):
    """The method get_<kind>_<what> of the mpu, for the first kind that it has."""
    for kind in kinds:
        method = getattr(source, f"get_{kind}_{what}", None)
        if method is not None:
            return method
    return None


def _size_of_mpu(source, *kinds):
    method = _mpu_method(source, *kinds, what="world_size")
    return 1 if method is None else method()


def _mesh_group(dimension):
    if mesh_device is None or dimension not in (mesh_device.mesh_dim_names or ()):
        return None
    return mesh_device.get_group(dimension)


def _find(made, dimension, *kinds):
    """The group by Note [Who decides a group]; None when only the fallback is left."""
    method = _mpu_method(mpu, *kinds, what="group") if mpu is not None else None
    if method is not None:
        return method()
    return _mesh_group(dimension) or made


def _known(group, what):
    if group is None:
        raise KeyError(f"there is no {what} group: nothing was made parallel in that way")
    return group


# ---- data
def _get_data_parallel_group():
    pg._require("the data parallel group")
    return _find(_made.data, "data_parallel", "data_parallel") or pg.get_world_group()


def _get_data_parallel_world_size():
    method = _mpu_method(mpu, "data_parallel", what="world_size") if mpu is not None else None
    return method() if method is not None else pg.get_world_size(_get_data_parallel_group())


def _get_data_parallel_rank():
    return pg.get_rank(_get_data_parallel_group())


def _get_data_parallel_group_ranks():
    return pg.get_all_ranks_from_group(_get_data_parallel_group())


def _get_broadcast_src_rank():
    return _get_data_parallel_group_ranks()[0]


def get_data_parallel_group():
    return _get_data_parallel_group()


def get_data_parallel_world_size():
    return _get_data_parallel_world_size()


def get_data_parallel_rank():
    return _get_data_parallel_rank()


# ---- tensor
def _tensor_group():
    return _find(_made.tensor, "tensor_parallel", "tensor_model_parallel", "model_parallel")


def get_tensor_model_parallel_group():
    return _known(_tensor_group(), "tensor parallel")


def get_tensor_model_parallel_world_size():
    if _made.tensor_size_override is not None:
        return _made.tensor_size_override
    group = _tensor_group()
    return 1 if group is None else pg.get_world_size(group)


def get_tensor_model_parallel_rank():
    if _made.tensor_rank_override is not None:
        return _made.tensor_rank_override
    group = _tensor_group()
    return 0 if group is None else pg.get_rank(group)


def get_tensor_model_parallel_src_rank():
    """The world rank of the first rank that shares tensors with this one."""
    group = _tensor_group()
    return pg.get_rank() if group is None else pg.get_all_ranks_from_group(group)[0]


def set_tensor_model_parallel_world_size(world_size):
    """Overrides what the groups say; None takes it back."""
    _made.tensor_size_override = world_size


def set_tensor_model_parallel_rank(rank):
    _made.tensor_rank_override = rank


get_model_parallel_group = get_tensor_model_parallel_group
get_model_parallel_world_size = get_tensor_model_parallel_world_size
get_model_parallel_rank = get_tensor_model_parallel_rank
_get_model_parallel_world_size = get_tensor_model_parallel_world_size


# ---- sequence
def _sequence_group():
    return _find(None, "sequence_parallel", "sequence_parallel")


def _get_sequence_parallel_group():
    return _known(_sequence_group(), "sequence parallel")


def _get_sequence_parallel_world_size():
    method = _mpu_method(mpu, "sequence_parallel", what="world_size") if mpu is not None else None
    if method is not None:
        return method()
    group = _mesh_group("sequence_parallel")
    return 1 if group is None else pg.get_world_size(group)


def _get_sequence_parallel_rank():
    method = _mpu_method(mpu, "sequence_parallel", what="rank") if mpu is not None else None
    if method is not None:
        return method()
    group = _mesh_group("sequence_parallel")
    return 0 if group is None else pg.get_rank(group)


def _get_sequence_data_parallel_group():
    method = _mpu_method(mpu, "sequence_data_parallel", what="group") if mpu is not None else None
    if method is not None:
        return method()
    if mpu is None and _mesh_group("sequence_parallel") is not None:
        return pg.get_world_group()  # the mesh is data x sequence: their product is everyone
    return _get_data_parallel_group()


def _get_sequence_data_parallel_world_size():
    return pg.get_world_size(_get_sequence_data_parallel_group())


def _get_sequence_data_parallel_rank():
    return pg.get_rank(_get_sequence_data_parallel_group())


# ---- experts
def _get_expert_parallel_group(group_name):
    return _known(_made.expert.get(group_name), f"expert parallel ({group_name})")


def _get_expert_parallel_group_dict():
    return _made.expert


def _get_expert_parallel_world_size(group_name):
    return pg.get_world_size(_get_expert_parallel_group(group_name))


def _get_expert_parallel_rank(group_name):
    return pg.get_rank(_get_expert_parallel_group(group_name))


def _get_expert_parallel_group_ranks(group_name):
    return pg.get_all_ranks_from_group(_get_expert_parallel_group(group_name))


def _get_expert_parallel_src_rank(group_name):
    return _get_expert_parallel_group_ranks(group_name)[0]


def _get_expert_data_parallel_group(group_name):
    return _known(_made.expert_data.get(group_name), f"expert data parallel ({group_name})")


def _get_expert_data_parallel_group_dict():
    return _made.expert_data


def _get_expert_data_parallel_world_size(group_name):
    return pg.get_world_size(_get_expert_data_parallel_group(group_name))


def _get_expert_data_parallel_rank(group_name):
    return pg.get_rank(_get_expert_data_parallel_group(group_name))


def _get_expert_data_parallel_group_ranks(group_name):
    return pg.get_all_ranks_from_group(_get_expert_data_parallel_group(group_name))


def _get_expert_broadcast_src_rank(group_name):
    return _get_expert_data_parallel_group_ranks(group_name)[0]


def _get_max_expert_size_name():
    return f"ep_size_{_get_max_expert_size()}"


def _get_max_expert_size():
    _known(_made.expert or None, "expert parallel")
    return max(int(name.rsplit("_", 1)[1]) for name in _made.expert)


def _get_max_expert_parallel_group():
    return _get_expert_parallel_group(_get_max_expert_size_name())


def _get_expert_model_parallel_world_size():
    return expert_tensor_parallel_world_size


# ---- hybrid sharding
def _zero_param_parallel_is_initialized():
    return _made.zero_intra is not None


def _get_zero_param_intra_parallel_group():
    """The group of neighbours of hybrid sharding, None when there is none."""
    return _made.zero_intra


def _get_zero_param_intra_parallel_group_world_size():
    return pg.get_world_size(_known(_made.zero_intra, "ZeRO intra-node"))


def _get_zero_param_intra_parallel_rank_in_mygroup():
    return pg.get_rank(_known(_made.zero_intra, "ZeRO intra-node"))


def _get_zero_param_intra_parallel_group_ranks():
    return pg.get_all_ranks_from_group(_known(_made.zero_intra, "ZeRO intra-node"))
