# SPDX-License-Identifier: Apache-2.0
"""Frozen weights of whole numbers, as quantised models have, under ZeRO: sharded, gathered for the forward, never reduced; LoRA trains on top."""
import pytest
import torch
import torch.distributed as dist
from torch import nn

import deepspeed
from tests.parity.launch import on_ranks
from tests.parity.tiny import whole

WIDTH, LAYERS, RANK = 65, 3, 4


class Quantised(nn.Module):
    """y = x W with W = (codes - 128) * scale, and a trained low-rank part."""

    def __init__(self, width, dtype=torch.uint8):
        super().__init__()
        self.codes = nn.Parameter(torch.randint(0, 127, (width, width), dtype=torch.int32).to(dtype), requires_grad=False)
        self.scale = nn.Parameter(torch.rand(width, 1) / 500, requires_grad=False)
        self.down = nn.Parameter(torch.randn(RANK, width) / 8)
        self.up = nn.Parameter(torch.zeros(width, RANK))

    def forward(self, x):
        weight = (self.codes.to(x.dtype) - 64) * self.scale.to(x.dtype)
        return torch.tanh(x @ weight.T + x @ self.down.T @ self.up.T)


def model(dtype=torch.uint8, width=WIDTH):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        return nn.Sequential(*(Quantised(width, dtype) for _ in range(LAYERS)))


def engine_of(module, stage, **more):
    trained = [p for p in module.parameters() if p.requires_grad]
    config = {"train_micro_batch_size_per_gpu": 2, "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
              "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0}, **more}
    return deepspeed.initialize(model=module, model_parameters=trained, config=config)[0]


def losses_of(engine, steps=4, width=WIDTH):
    generator = torch.Generator().manual_seed(dist.get_rank())
    found = []
    for _ in range(steps):
        x = torch.randn(2, width, generator=generator).to(engine.get_data_types()[0])
        loss = (engine(x) - 0.1).square().mean()
        engine.backward(loss)
        engine.step()
        found.append(loss.item())
    return found


@on_ranks(2)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32])
@pytest.mark.parametrize("bf16", [False, True])
def test_stages_agree_and_codes_stay(dtype, bf16, tmp_path):
    more = {"bf16": {"enabled": True}} if bf16 else {}
    wanted = losses_of(engine_of(model(dtype), 0, **more))
    codes = {name: p.clone() for name, p in model(dtype).named_parameters() if name.endswith("codes")}
    for stage in (2, 3):
        engine = engine_of(model(dtype), stage, **more)
        assert losses_of(engine) == wanted
        found = whole(engine.module)
        assert all(values.any() for name, values in found.items() if name.endswith("up"))
        assert all(torch.equal(found[name], values) and found[name].dtype == dtype for name, values in codes.items())
        engine.save_checkpoint(tmp_path / str(stage))
        again = engine_of(model(dtype), stage, **more)
        again.load_checkpoint(tmp_path / str(stage))
        assert losses_of(again, 1) == losses_of(engine, 1)


@on_ranks(2)
def test_a_rank_holds_half():
    engine = engine_of(model(width=512), 3)
    engine.empty_partition_cache()
    codes = LAYERS * 512 * 512
    others = LAYERS * 4 * (512 + 2 * RANK * 512)
    assert engine._managed.store.bytes()["parameters"] <= (codes + others) / 2 * 1.01 + 4096
    mine = [p.ds_tensor for name, p in engine.module.named_parameters() if name.endswith("codes")]
    assert all(piece.dtype == torch.uint8 for piece in mine) and sum(piece.numel() for piece in mine) == codes / 2
    losses_of(engine, 1, width=512)
    # Gradients and optimizer state are of the trained factors only.
    assert engine._managed.reducer.accumulator_bytes() <= LAYERS * 4 * 2 * RANK * 512 * 0.6


@on_ranks(2)
def test_built_in_shards():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        with deepspeed.zero.Init(dtype=torch.float32):
            module = nn.Sequential(*(Quantised(WIDTH) for _ in range(LAYERS)))
    assert losses_of(engine_of(module, 3)) == losses_of(engine_of(model(), 3))
