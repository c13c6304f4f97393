# SPDX-License-Identifier: Apache-2.0
"""A small model that has one of everything a checkpoint must keep, its data, and the loop around it."""
import torch
from torch import nn

import deepspeed

ROWS = 12   # of a global batch: divides by 1, 2, 3 and 4


class Everything(nn.Module):
    """Tied and frozen parameters, one in another order of memory, odd sizes, a 0-dim one, an empty one, buffers, dropout. forward(x) is
    the loss."""

    def __init__(self, width=11, dropout=0.0):
        super().__init__()
        self.first = nn.Linear(width, width, bias=False)
        self.conv = nn.Conv2d(3, 5, 3, padding=1).to(memory_format=torch.channels_last)
        self.still = nn.Linear(width, 7)
        self.still.requires_grad_(False)
        self.inner = nn.Linear(7, width)
        self.last = nn.Linear(width, width, bias=False)
        self.last.weight = self.first.weight
        self.scale = nn.Parameter(torch.tensor(1.25))
        self.nothing = nn.Parameter(torch.empty(0))
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("scratch", torch.zeros(3), persistent=False)

    def forward(self, x):
        if self.training:
            self.calls += 1
        y = torch.tanh(self.first(x))
        y = self.dropout(self.last(self.inner(torch.tanh(self.still(y)))))
        picture = self.conv(y[:, :9].reshape(-1, 1, 3, 3).expand(-1, 3, 3, 3)).mean((1, 2, 3))
        return ((y.sum(-1) * self.scale + picture).float() - x.float().sum(-1)).square().mean()


def everything(seed=3, **sizes):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Everything(**sizes)


PRECISIONS = {"fp32": {}, "bf16": {"bf16": {"enabled": True}},
              "fp16": {"fp16": {"enabled": True, "initial_scale_power": 20, "loss_scale_window": 2, "hysteresis": 1}}}


def config(stage, precision="fp32", micro=2, accumulation=1, **more):
    zero = {"stage": stage, "stage3_prefetch_bucket_size": 100, "stage3_param_persistence_threshold": 0, **more.pop("zero", {})}
    return {"train_micro_batch_size_per_gpu": micro, "gradient_accumulation_steps": accumulation, "zero_optimization": zero,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}}, "gradient_clipping": 1.0,
            "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 1e-2, "warmup_num_steps": 7}}, **PRECISIONS[precision], **more}


def start(cfg, model=None, **arguments):
    return deepspeed.initialize(model=everything() if model is None else model, config=cfg, **arguments)[0]


def rows(step, rank, world, width=11):
    """This rank's part of the global batch of a micro-batch."""
    generator = torch.Generator().manual_seed(step)
    whole = torch.randn(ROWS, width, generator=generator)
    count = ROWS // world
    return whole[rank * count:(rank + 1) * count]


def train(engine, steps, first=0):
    """Losses of this rank, one a micro-batch; `steps` are updates."""
    import torch.distributed as dist
    losses, gas = [], engine.gradient_accumulation_steps()
    for micro in range(first * gas, (first + steps) * gas):
        loss = engine(rows(micro, dist.get_rank(), dist.get_world_size()).to(engine.get_data_types()[0]))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def state(engine):
    """Every tensor of the model and the optimizer, whole, by (name, kind), on every rank."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
    found = {}
    for name, p in engine.module.named_parameters():
        master = safe_get_full_fp32_param(p)
        if master is None:
            with deepspeed.zero.GatheredParameters([p]):
                found[name, "weight"] = p.detach().clone()
            continue
        found[name, "fp32"] = master.clone()
        for key in ("exp_avg", "exp_avg_sq", "momentum_buffer"):
            value = safe_get_full_optimizer_state(p, key)
            if value is not None:
                found[name, key] = value.clone()
    found.update(((name, "buffer"), b.clone()) for name, b in engine.module.named_buffers() if name != "scratch")
    return found


def assert_same(left, right):
    assert left.keys() == right.keys()
    for key in left:
        assert left[key].dtype == right[key].dtype and torch.equal(left[key], right[key]), key
