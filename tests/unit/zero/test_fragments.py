# SPDX-License-Identifier: Apache-2.0
"""Linking parameters to the flat tensor a caller keeps himself."""
import pytest
import torch

from deepspeed.utils import get_hp_fragment_mapping, lazy_init_hp_params_optimizer_state, link_hp_params, map_to_flat_opt_states

SIZES = [(2, 3), (5,), (4,)]   # 6 + 5 + 4 = 15 elements; the partition holds elements 4..11


def linked():
    params = [torch.nn.Parameter(torch.zeros(size)) for size in SIZES]
    partition = torch.arange(4.0, 12.0)
    grads = {0: [torch.ones(2), torch.full((5,), 2.0), torch.full((1,), 3.0)]}
    link_hp_params(params, partition, grads, {}, False, 0, 4, 8, "group")
    return params, partition


def test_fragments_are_views_of_both_tensors():
    params, partition = linked()
    assert [p._hp_mapping.hp_fragment.tolist() for p in params] == [[4, 5], [6, 7, 8, 9, 10], [11]]
    assert [(p._hp_mapping.lp_fragment_address.start, p._hp_mapping.lp_fragment_address.numel) for p in params] == [(4, 2), (0, 5), (0, 1)]
    for p in params:
        p._hp_mapping.update_lp()
        assert p._dp_group == "group"
    assert [p.flatten().tolist() for p in params] == [[0, 0, 0, 0, 4, 5], [6, 7, 8, 9, 10], [11, 0, 0, 0]]
    assert params[1]._hp_mapping.get_lp_grad_fragment(1).tolist() == [2.0] * 5
    far = torch.nn.Parameter(torch.zeros(3))
    link_hp_params([far], partition, {}, {}, False, 0, 4, 8, None, param_offsets={far: 12})
    assert far._hp_mapping is None
    with pytest.raises(ValueError, match="does not meet the partition"):
        get_hp_fragment_mapping(far, 12, partition, {}, {}, False, 0, 4, 8)


def test_states_of_the_flat_tensor_are_seen_by_the_parameters_and_back():
    params, partition = linked()
    state = {partition: {"exp_avg": torch.arange(8.0), "step": torch.tensor(3.0)}}
    lazy_init_hp_params_optimizer_state(params, partition, state)
    assert params[1]._hp_mapping.get_optim_state_keys() == ["exp_avg"]
    assert params[1]._hp_mapping.get_optim_state_fragment("exp_avg").tolist() == [2, 3, 4, 5, 6]
    params[2]._hp_mapping.optim_fragment["exp_avg"] = torch.tensor([70.0])
    map_to_flat_opt_states(partition, params, state, ["exp_avg"])
    assert state[partition]["exp_avg"].tolist() == [0, 1, 2, 3, 4, 5, 6, 70]
    state[partition]["exp_avg"].zero_()
    assert params[0]._hp_mapping.get_optim_state_fragment("exp_avg").tolist() == [0, 0]
    with pytest.raises(ValueError, match="no state 'other'"):
        params[0]._hp_mapping.get_optim_state_fragment("other")
