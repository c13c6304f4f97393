# SPDX-License-Identifier: Apache-2.0
"""A model of 700 parameters in five units, its data, and the loop around it, for tests of behaviour rather than of numbers."""
import torch
from torch import nn

import deepspeed


class Layer(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, width)

    def forward(self, x):
        return x + torch.tanh(self.linear(self.norm(x)))


class Tiny(nn.Module):
    """forward(x) is the scalar loss. Sizes do not divide by two; `seen` is a buffer that training changes."""

    def __init__(self, width=9, layers=4):
        super().__init__()
        self.layers = nn.ModuleList(Layer(width) for _ in range(layers))
        self.head = nn.Linear(width, 1)
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("scratch", torch.zeros(3), persistent=False)

    def body(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x)

    def forward(self, x):
        self.seen += 1
        return (self.body(x).float() - x.float().sum(-1, keepdim=True)).square().mean()


def tiny(seed=3, **sizes):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Tiny(**sizes)


def config(stage, **more):
    """Many small units, and at stage 3 every one of them sharded."""
    zero = {"stage": stage, "stage3_prefetch_bucket_size": 100, "stage3_param_persistence_threshold": 0, **more.pop("zero", {})}
    base = {"train_micro_batch_size_per_gpu": 2, "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}}, "zero_optimization": zero}
    base.update(more)
    return {key: value for key, value in base.items() if value is not None}


def batch(step, rank=None, width=9, rows=2):
    import torch.distributed as dist
    rank = dist.get_rank() if rank is None else rank
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randn(rows, width, generator=generator)


def engine_of(model, cfg, **arguments):
    return deepspeed.initialize(model=model, config=cfg, **arguments)[0]


def train(engine, steps=3, first=0, width=9):
    """Losses of this rank."""
    losses = []
    dtype = engine.get_data_types()[0]
    for step in range(first, first + steps):
        loss = engine(batch(step, width=width).to(dtype))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def whole(model):
    """Copies of all parameters by name, on every rank."""
    params = dict(model.named_parameters())
    with deepspeed.zero.GatheredParameters(params.values()):
        return {name: p.detach().clone() for name, p in params.items()}


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name
