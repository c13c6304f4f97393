# SPDX-License-Identifier: Apache-2.0
"""Engines on a part of the ranks (a data-parallel group), and hybrid sharding: parameters cut over some ranks, replicated over others."""
import time

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

import deepspeed
from deepspeed.utils import safe_get_full_grad, safe_get_local_grad, safe_set_full_grad, safe_set_local_grad
from deepspeed.zero import transports
from tests.parity import tiny
from tests.parity.launch import on_ranks, run
from tests.parity.training import transport

ADAMW = {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.01}}


class Columns:
    """Model-parallel columns [0, 1] and [2, 3]; data-parallel groups [0, 2] and [1, 3]."""

    def __init__(self):
        self.groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
        self.column = dist.get_rank() % 2

    def get_data_parallel_group(self):
        return self.groups[self.column]

    def get_data_parallel_rank(self):
        return dist.get_rank() // 2

    def get_data_parallel_world_size(self):
        return 2

    def get_model_parallel_group(self):
        return None

    def get_model_parallel_rank(self):
        return self.column

    def get_model_parallel_world_size(self):
        return 2


def alone(column, steps=3):
    """What one process makes of both data-parallel ranks' batches of a column."""
    model = tiny.tiny(seed=column)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.01)
    for step in range(steps):
        for row in range(2):
            (model(tiny.batch(step, rank=2 * row + column)) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    return dict(model.named_parameters())


def come_one_by_one():
    """Rank 0, then the ranks of the other column, then rank 2, which must not take what those left in the store for rank 0's."""
    time.sleep(0.4 * (0, 1, 2, 1)[dist.get_rank()])


def train_columns(all_ranks):
    """`all_ranks`: as with a backend that makes every group with the help of all ranks."""
    columns = Columns()
    want = alone(columns.column)
    asked = transports._backend_needs_all_ranks
    if all_ranks:
        transports._backend_needs_all_ranks = lambda: True
    try:
        with transport("c10d"):
            for stage in (1, 3):
                if not all_ranks:
                    come_one_by_one()
                engine = tiny.engine_of(tiny.tiny(seed=columns.column), tiny.config(stage, gradient_clipping=0.0, optimizer=ADAMW), mpu=columns)
                tiny.train(engine)
                for name, value in tiny.whole(engine.module).items():
                    torch.testing.assert_close(value, want[name], rtol=1e-5, atol=1e-6)
                engine.destroy()
    finally:
        transports._backend_needs_all_ranks = asked


@pytest.mark.parametrize("all_ranks", [False, True])
def test_engines_on_data_parallel_groups_over_gloo(all_ranks):
    run(train_columns, 4, all_ranks, timeout=25)


def init_on_a_part():
    group = dist.new_group([1, 3])
    with transport("c10d"):
        if dist.get_rank() in (1, 3):   # the others have nothing to do with it
            with deepspeed.zero.Init(data_parallel_group=group):
                linear = nn.Linear(5, 3)
            with deepspeed.zero.GatheredParameters(list(linear.parameters())):
                assert linear.weight.shape == (3, 5)
        # Ranks 1 and 3 have made a group more than the others, who must find them all the same.
        engine = tiny.engine_of(tiny.tiny(), tiny.config(1))
        assert tiny.train(engine, steps=1)
        engine.destroy()


def test_init_on_some_of_the_ranks():
    run(init_on_a_part, 4, timeout=30)


# ---- hybrid sharding


class SharedLayer(nn.Module):
    """One layer used in two reentrant checkpoints: its second gradient comes too late for the round of the first."""

    def __init__(self, checkpointed):
        super().__init__()
        self.shared, self.between = nn.Linear(9, 9), nn.Linear(9, 9)
        self.checkpointed = checkpointed

    def segment(self, x):
        return torch.tanh(self.shared(x))

    def forward(self, x):
        for layer in (self.segment, self.between, self.segment):
            x = checkpoint(layer, x, use_reentrant=True) if self.checkpointed and layer is not self.between else layer(x)
        return x.square().mean()


def shared_layer(checkpointed):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return SharedLayer(checkpointed)


def inputs(step, rank=None):
    return tiny.batch(step, rank).requires_grad_()


def train_shared(shard_size, checkpointed):
    model = shared_layer(checkpointed)
    engine = tiny.engine_of(model, tiny.config(3, zero={"zero_hpz_partition_size": shard_size}))
    norms = []
    for step in range(3):
        engine.backward(engine(inputs(step)))
        engine.step()
        norms.append(engine.get_global_grad_norm())
    params = tiny.whole(model)
    engine.destroy()
    return norms, params


@on_ranks(4)
def test_gradients_that_come_late_are_added_once_over_replicas():
    want_norms, want = train_shared(1, checkpointed=False)
    norms, params = train_shared(2, checkpointed=True)
    torch.testing.assert_close(norms, want_norms, rtol=1e-6, atol=0)
    for name, value in params.items():
        torch.testing.assert_close(value, want[name], rtol=1e-5, atol=1e-6)


@on_ranks(4)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_gradients_read_under_hybrid_sharding_are_the_averages_of_all_ranks(accumulation):
    reference = shared_layer(False)
    for micro in range(accumulation):
        for rank in range(4):
            (reference(inputs(micro, rank)) / 4 / accumulation).backward()
    engine = tiny.engine_of(shared_layer(False), tiny.config(3, gradient_accumulation_steps=accumulation,
                                                             zero={"zero_hpz_partition_size": 2}))
    for micro in range(accumulation):
        engine.backward(engine(inputs(micro)))
        weight = engine.module.shared.weight
        got = safe_get_full_grad(weight)   # also in the middle of an accumulation, where it must not change what follows
        local = safe_get_local_grad(weight)
        if micro + 1 < accumulation:
            engine.step()
    torch.testing.assert_close(got, reference.shared.weight.grad, rtol=1e-5, atol=1e-7)
    _, begin, _, numel = weight.ds_home.owner.place(weight)
    assert torch.equal(local, got.flatten()[begin:begin + numel])
    engine.step()
    want = torch.sqrt(sum(p.grad.square().sum() for p in reference.parameters())).item()
    assert engine.get_global_grad_norm() == pytest.approx(want, rel=1e-5)
    engine.destroy()


@on_ranks(4)
@pytest.mark.parametrize("local", [False, True])
def test_gradients_set_under_hybrid_sharding_are_what_is_stepped(local):
    engine = tiny.engine_of(shared_layer(False), tiny.config(3, zero={"zero_hpz_partition_size": 2}))
    engine.backward(engine(inputs(0)))
    total = 0.0
    for number, parameter in enumerate(engine.module.parameters()):
        value = torch.full(parameter.shape, 0.5 + number)
        if local:
            safe_set_local_grad(parameter, torch.full_like(safe_get_local_grad(parameter), 0.5 + number))
        else:
            safe_set_full_grad(parameter, value)
        assert torch.equal(safe_get_full_grad(parameter), value)
        total += value.square().sum().item()
    engine.step()
    assert engine.get_global_grad_norm() == pytest.approx(total ** 0.5)
    engine.destroy()


class Counted(tiny.Tiny):
    """With a tied parameter under a second name, and state that is no tensor."""

    def __init__(self):
        super().__init__()
        self.tied = self.layers[0].linear.weight
        self.remembered = 0

    def get_extra_state(self):
        return {"remembered": self.remembered}

    def set_extra_state(self, state):
        self.remembered = state["remembered"]


def resume_columns(folder):
    """Each column's parameters, states, groups, second names and extra state come back to that column."""
    columns = Columns()
    with transport("c10d"):
        for stage in (1, 3):
            def build(seed):
                torch.manual_seed(seed)
                model = Counted()
                groups = [{"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1},
                          {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0}]
                return tiny.engine_of(model, tiny.config(stage, optimizer=None), mpu=columns, optimizer=torch.optim.AdamW(groups, lr=1e-2))

            where = f"{folder}/{stage}"
            engine = build(columns.column)
            engine.module.remembered = 10 + columns.column
            tiny.train(engine, 3)
            engine.optimizer.param_groups[1]["lr"] = 0.02
            engine.save_checkpoint(where)
            want, losses = tiny.whole(engine.module), tiny.train(engine, 3)
            engine.destroy()

            engine = build(seed=50)
            engine.load_checkpoint(where)
            assert engine.module.remembered == 10 + columns.column
            assert [group["lr"] for group in engine.optimizer.param_groups] == [1e-2, 0.02]
            found = tiny.whole(engine.module)
            assert all(torch.equal(found[name], want[name]) for name in want)
            assert tiny.train(engine, 3) == losses
            engine.destroy()


def test_checkpoints_of_columns(tmp_path):
    run(resume_columns, 4, str(tmp_path), timeout=60)
