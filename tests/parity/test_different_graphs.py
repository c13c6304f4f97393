# SPDX-License-Identifier: Apache-2.0
"""Ranks whose graphs differ: what one rank's backward does not use, another's waits for."""
import os

import pytest
import torch

import deepspeed
from tests.parity.launch import run


class Skipping(torch.nn.Module):
    """On the ranks that skip, the first layers take no part."""

    def __init__(self, layers=5):
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Linear(16, 16) for _ in range(layers)])

    def forward(self, x, skip):
        for layer in self.layers[skip:]:
            x = torch.tanh(layer(x))
        return x


def train(choice, skips, build=Skipping):
    os.environ["DS_TRANSPORT"] = choice
    rank = torch.distributed.get_rank()
    torch.manual_seed(0)
    model = build()
    config = {"train_micro_batch_size_per_gpu": 2, "optimizer": {"type": "SGD", "params": {"lr": 0.1}}, "gradient_clipping": 0.0,
              "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0, "reduce_bucket_size": 300,
                                    "stage3_prefetch_bucket_size": 300}}
    engine, *_ = deepspeed.initialize(model=model, config=config)
    for _ in range(3):
        engine.backward(engine(torch.ones(2, 16), skips[rank]).square().mean())
        engine.step()
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        found = [p.detach().clone() for p in model.parameters()]
    engine.destroy()
    return found


def reference(skips, build=Skipping):
    torch.manual_seed(0)
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (sum(model(torch.ones(2, 16), skip).square().mean() for skip in skips) / len(skips)).backward()
        optimizer.step()
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("choice", ["shm", "c10d"])
@pytest.mark.parametrize("skips", [(2, 0), (0, 3)])
def test_layers_at_the_end_of_backward_that_one_rank_does_not_use(choice, skips):
    for got in run(train, 2, choice, skips, timeout=40):
        for mine, expected in zip(got, reference(skips)):
            torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-6)


class SkippingInside(torch.nn.Module):
    """On the ranks that skip, layers in the middle take no part (stochastic depth)."""

    def __init__(self, layers=12):
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Linear(16, 16) for _ in range(layers)])

    def forward(self, x, skipped):
        for number, layer in enumerate(self.layers):
            if number not in skipped:
                x = torch.tanh(layer(x))
        return x


@pytest.mark.parametrize("choice", ["shm", "c10d"])
@pytest.mark.parametrize("skips", [(range(6, 9), ()), (range(4, 10), range(2, 3))])
def test_layers_in_the_middle_that_one_rank_does_not_use(choice, skips):
    expected = reference(skips, SkippingInside)
    for got in run(train, 2, choice, skips, SkippingInside, timeout=40):
        for mine, value in zip(got, expected):
            torch.testing.assert_close(mine, value, rtol=1e-5, atol=1e-6)
