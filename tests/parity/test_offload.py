# SPDX-License-Identifier: Apache-2.0
"""State that rests in files gives the same training, bit for bit, and nothing in the folder outlives a process."""
import os

import pytest
import torch
import torch.distributed as dist

from tests.parity.launch import on_ranks
from tests.parity.tiny import assert_same, config, engine_of, tiny, train, whole

STEPS = 50


def on_files(folder, optimizer=True, parameters=False):
    zero = {}
    if optimizer:
        zero["offload_optimizer"] = {"device": "nvme", "nvme_path": str(folder), "buffer_count": 4}
    if parameters:
        zero["offload_param"] = {"device": "nvme", "nvme_path": str(folder), "max_in_cpu": 0}
    return zero


def trained(stage, precision, zero, steps=STEPS, **more):
    settings = {"bf16": {"enabled": True}} if precision == "bf16" else {}
    # Wide enough that a unit's slice is several pages.
    engine = engine_of(tiny(width=65), config(stage, zero=zero, gradient_clipping=0.5, **settings, **more))
    losses = train(engine, steps, width=65)
    values = whole(engine.module)
    states = {name: value.clone() for name, entry in engine.optimizer.state_dict()["state"].items()
              for name, value in ((f"{name}/{key}", value) for key, value in entry.items()) if torch.is_tensor(value)}
    engine.destroy()
    return losses, values, states


def same(got, want):
    assert got[0] == want[0]
    assert_same(got[1], want[1])
    assert_same(got[2], want[2])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage,optimizer,parameters", [(1, True, False), (2, True, False), (3, True, False), (3, False, True), (3, True, True)])
@on_ranks(2)
def test_the_same_bits(stage, optimizer, parameters, precision, tmp_path):
    want = trained(stage, precision, {})
    same(trained(stage, precision, on_files(tmp_path, optimizer, parameters)), want)
    dist.barrier()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@on_ranks(1)
def test_one_rank_frees_its_parameters_too(precision, tmp_path):
    want = trained(3, precision, {}, steps=5)
    same(trained(3, precision, on_files(tmp_path, True, True), steps=5), want)
