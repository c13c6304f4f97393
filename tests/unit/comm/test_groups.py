# SPDX-License-Identifier: Apache-2.0
"""Which ranks share what: the integer functions by themselves, then the groups on two and four ranks."""
import types

import pytest

from deepspeed import comm
from deepspeed.comm import groups
from tests.parity.launch import on_ranks


def test_split():
    assert groups.split_ranks(range(4), 2, "x") == ([[0, 1], [2, 3]], [[0, 2], [1, 3]])
    with pytest.raises(ValueError, match="an x of 3 does not divide 4 ranks"):
        groups.split_ranks(range(4), 3, "an x")


def test_expert_ranks():
    assert groups.expert_ranks(8, 1, 4) == ([[0, 1, 2, 3], [4, 5, 6, 7]], [[0, 4], [1, 5], [2, 6], [3, 7]])
    split = groups.expert_ranks(8, 2, 2)  # tensor groups (0,1) (2,3) ...: experts lie among equal tensor ranks
    assert split.inner == [[0, 2], [4, 6], [1, 3], [5, 7]] and split.outer == [[0, 4], [2, 6], [1, 5], [3, 7]]
    far = groups.expert_ranks(8, 1, 4, use_data_before_expert=True)
    assert far.inner == [[0, 2, 4, 6], [1, 3, 5, 7]] and far.outer == [[0, 1], [2, 3], [4, 5], [6, 7]]
    with pytest.raises(ValueError, match="expert parallel size of 3"):
        groups.expert_ranks(8, 1, 3)


@pytest.mark.parametrize("tensor_size", [1, 2])
@pytest.mark.parametrize("expert_size", [1, 2, 4])
@pytest.mark.parametrize("data_first", [False, True])
def test_expert_ranks_partition_the_world(tensor_size, expert_size, data_first):
    split = groups.expert_ranks(8, tensor_size, expert_size, data_first)
    for kind, size in ((split.inner, expert_size), (split.outer, 8 // tensor_size // expert_size)):
        assert sorted(rank for ranks in kind for rank in ranks) == list(range(8))
        assert all(len(ranks) == size for ranks in kind)


@on_ranks(2)
def test_defaults():
    groups._forget_all()
    rank = comm.get_rank()
    assert groups._get_data_parallel_world_size() == groups.get_data_parallel_world_size() == 2
    assert groups._get_data_parallel_rank() == groups.get_data_parallel_rank() == rank
    assert groups._get_data_parallel_group_ranks() == [0, 1] and groups._get_broadcast_src_rank() == 0
    assert groups._get_sequence_parallel_world_size() == 1 and groups._get_sequence_parallel_rank() == 0
    assert groups._get_sequence_data_parallel_world_size() == 2 and groups._get_sequence_data_parallel_rank() == rank
    assert groups.get_tensor_model_parallel_world_size() == groups.get_model_parallel_world_size() == 1
    assert groups.get_tensor_model_parallel_rank() == groups.get_model_parallel_rank() == 0
    assert groups._get_zero_param_intra_parallel_group() is None and groups._get_expert_parallel_group_dict() == {}
    for ask in (groups._get_sequence_parallel_group, groups.get_tensor_model_parallel_group,
                lambda: groups._get_expert_parallel_group("ep_size_2")):
        with pytest.raises(KeyError, match="there is no"):
            ask()
    assert groups._clone_world_group() is groups._clone_world_group() is not comm.get_world_group()
    groups._forget_all()


@on_ranks(4)
def test_made_groups():
    groups._forget_all()
    rank = comm.get_rank()
    data, tensor = groups._create_model_parallel(2)
    assert comm.get_all_ranks_from_group(tensor) == [rank - rank % 2, rank - rank % 2 + 1]
    assert comm.get_all_ranks_from_group(data) == [rank % 2, rank % 2 + 2]
    assert groups.get_tensor_model_parallel_rank() == rank % 2 and groups.get_data_parallel_rank() == rank // 2
    assert groups.get_tensor_model_parallel_src_rank() == rank - rank % 2
    groups.set_tensor_model_parallel_world_size(7)
    assert groups.get_tensor_model_parallel_world_size() == 7
    groups._forget_all()
    groups._create_expert_and_data_parallel(2)
    assert groups._get_expert_parallel_group_ranks("ep_size_2") == [rank - rank % 2, rank - rank % 2 + 1]
    assert groups._get_expert_data_parallel_group_ranks("ep_size_2") == [rank % 2, rank % 2 + 2]
    assert groups._get_expert_parallel_rank("ep_size_2") == rank % 2
    assert groups._get_expert_data_parallel_world_size("ep_size_2") == 2
    assert groups._get_max_expert_size_name() == "ep_size_2"
    groups._create_zero_param_parallel_group(2)
    assert groups._get_zero_param_intra_parallel_rank_in_mygroup() == rank % 2
    assert groups._get_zero_param_intra_parallel_group_world_size() == 2
    groups._forget_all()


@on_ranks(4)
def test_mesh_and_mpu():
    groups._forget_all()
    rank = comm.get_rank()
    groups.mesh_device = comm.initialize_mesh_device((2, 2), ("data_parallel", "sequence_parallel"))
    assert groups._get_data_parallel_world_size() == 2 and groups._get_sequence_parallel_world_size() == 2
    assert groups._get_sequence_parallel_rank() == rank % 2 and groups._get_data_parallel_rank() == rank // 2
    assert groups._get_sequence_data_parallel_world_size() == 4
    groups._forget_all()
    data, tensor = groups._init_tp_mesh_device(2)
    assert comm.get_all_ranks_from_group(tensor) == [rank - rank % 2, rank - rank % 2 + 1]
    assert groups.get_tensor_model_parallel_world_size() == 2 and groups._get_data_parallel_world_size() == 2
    groups._forget_all()
    pairs = [comm.new_group([0, 1]), comm.new_group([2, 3])]
    groups.mpu = types.SimpleNamespace(get_sequence_parallel_world_size=lambda: 2, get_sequence_parallel_rank=lambda: rank % 2,
                                       get_sequence_parallel_group=lambda: pairs[rank // 2])
    assert groups._get_sequence_parallel_world_size() == 2 and groups._get_sequence_parallel_rank() == rank % 2
    assert comm.get_all_ranks_from_group(groups._get_sequence_parallel_group())[0] == rank - rank % 2
    groups._forget_all()


def test_mpu_of_every_generation():
    from deepspeed.utils import bwc

    assert bwc.bwc_tensor_model_parallel_rank() == 0 and bwc.bwc_tensor_model_parallel_world_size() == 1
    assert bwc.bwc_tensor_model_parallel_group() is None
    new = types.SimpleNamespace(get_tensor_model_parallel_rank=lambda: 1, get_model_parallel_rank=lambda: 2)
    old = types.SimpleNamespace(get_model_parallel_rank=lambda: 2)
    assert bwc.bwc_tensor_model_parallel_rank(new) == 1 and bwc.bwc_tensor_model_parallel_rank(old) == 2
