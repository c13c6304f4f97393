# SPDX-License-Identifier: Apache-2.0
"""Bytes by the formulas of the module's Note, worked out by hand for 1000 parameters."""
import pytest
import torch

from deepspeed.runtime.zero.stage3 import (estimate_zero3_model_states_mem_needs, estimate_zero3_model_states_mem_needs_all_cold,
                                           estimate_zero3_model_states_mem_needs_all_live)
from deepspeed.runtime.zero.stage_1_and_2 import (estimate_zero2_model_states_mem_needs, estimate_zero2_model_states_mem_needs_all_cold,
                                                  estimate_zero2_model_states_mem_needs_all_live)
from deepspeed.zero.estimates import ModelSize, model_size


@pytest.mark.parametrize("gpus,nodes,offload,host,device", [
    (1, 1, False, 4000, 18000), (4, 1, False, 16000, 2000 + 4000), (4, 2, False, 16000, 2000 + 2000), (4, 1, True, 16000, 2000),
    (2, 4, True, 8000, 2000), (1, 1, True, 16000, 2000),
])
def test_stage2(gpus, nodes, offload, host, device):
    assert estimate_zero2_model_states_mem_needs(1000, gpus, nodes, offload, additional_buffer_factor=1) == (host, device)
    assert estimate_zero2_model_states_mem_needs(1000, gpus, nodes, offload)[0] == host * 1.5


@pytest.mark.parametrize("gpus,nodes,states,params,zero_init,host,device", [
    (1, 1, False, False, True, 400, 400 + 18000), (4, 1, False, False, False, 16000, 400 + 4500), (4, 2, False, False, True, 1600, 400 + 2250),
    (4, 1, True, False, True, 16000, 400 + 500), (4, 1, True, True, True, 18000, 400), (4, 2, True, True, True, 9000, 400),
    (8, 1, True, True, False, 32000, 400),
])
def test_stage3(gpus, nodes, states, params, zero_init, host, device):
    found = estimate_zero3_model_states_mem_needs(1000, 100, gpus, nodes, states, params, zero_init, additional_buffer_factor=1)
    assert found == (host, device, 400)


def test_model_size_counts_shared_once():
    model = torch.nn.Sequential(torch.nn.Linear(10, 20), torch.nn.Linear(20, 20), torch.nn.Linear(20, 20))
    model[2].weight = model[1].weight
    assert model_size(model) == ModelSize(220 + 420 + 20, 420)


def test_tables(capsys):
    model = torch.nn.Linear(1000, 1000)
    estimate_zero3_model_states_mem_needs_all_live(model, num_gpus_per_node=2, num_nodes=1)
    live = capsys.readouterr().out
    estimate_zero3_model_states_mem_needs_all_cold(1001000, 1001000, num_gpus_per_node=2)
    assert live == capsys.readouterr().out and live.count("\n") == 10 and "offload_param=cpu, offload_optimizer=cpu, zero_init=1" in live
    estimate_zero2_model_states_mem_needs_all_live(model)
    live = capsys.readouterr().out
    estimate_zero2_model_states_mem_needs_all_cold(1001000)
    assert live == capsys.readouterr().out and live.count("\n") == 6
