# SPDX-License-Identifier: Apache-2.0
"""bf16.split_master: the bits of training with whole fp32 masters, in 12 bytes a parameter.

A split master's weight is rounded to nearest with ties away from zero, a whole one's with ties to even: one weight in 2^17 differs in its last bit
after an update. So that bits can be compared, the weights beside whole masters are rounded again, as the split form rounds them.
"""
import gc

import pytest
import torch
import torch.distributed as dist

import deepspeed
from deepspeed.utils import (safe_get_full_fp32_param, safe_get_full_optimizer_state, safe_get_local_fp32_param, safe_set_full_fp32_param,
                             safe_set_full_optimizer_state, safe_set_local_fp32_param)
from deepspeed.zero.accounting import held_bytes, places
from deepspeed.zero.split_master import SplitValues
from tests.parity.launch import on_ranks, run
from tests.parity.resident import field, growth
from tests.parity.test_offload import on_files
from tests.parity.test_offload_apart import TIERS
from tests.parity.tiny import assert_same, batch, config, engine_of, tiny, whole
from tests.parity.training import transport

WIDTH = 65


def settings(split, stage, zero=None, **more):
    return config(stage, zero=zero or {}, bf16={"enabled": True, "split_master": split}, **{"gradient_clipping": 0.5, **more})


def away_from_zero(masters):
    return ((masters.view(torch.int32) + 0x8000) >> 16).to(torch.int16).view(torch.bfloat16)


@torch.no_grad()
def settle(engine):
    """Weights beside whole masters are rounded as the split form rounds."""
    for s in engine.optimizer.slices:
        if not s.is_split:
            s.low.copy_(away_from_zero(s.master))
    engine.optimizer._publish()
    engine._managed.leave_files()


def start(split, stage, seed=3, zero=None, frozen=(), tamper=None, **more):
    model = tiny(seed, width=WIDTH)
    for number in frozen:
        model.layers[number].requires_grad_(False)
    engine = engine_of(model, settings(split, stage, zero, **more))
    assert all(s.is_split == split for s in engine.optimizer.slices)
    settle(engine)
    return engine


def train(engine, steps, first=0):
    losses = []
    for step in range(first, first + steps):
        loss = engine(batch(step, width=WIDTH).bfloat16())
        engine.backward(loss)
        engine.step()
        settle(engine)
        losses.append(loss.item())
    return losses


def state_of(engine):
    return {f"{name}/{key}": value.clone() for name, entry in engine.optimizer.state_dict()["state"].items()
            for key, value in entry.items() if torch.is_tensor(value)}


def results(engine, steps, first=0):
    losses = train(engine, steps, first)
    return losses, whole(engine.module), state_of(engine)


def same(got, want):
    assert got[0] == want[0]
    assert_same(got[1], want[1])
    assert_same(got[2], want[2])


def compare(stage, steps=12, zero=None, **more):
    found = []
    for split in (False, True):
        engine = start(split, stage, zero=zero, **more)
        found.append(results(engine, steps))
        engine.destroy()
    same(found[1], found[0])


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_same_bits(stage, ranks):
    run(compare, ranks, stage, 50 if ranks == 2 else 12)


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("case", ["accumulation", "frozen", "frozen meanwhile"])
@on_ranks(2)
def test_the_same_bits_with(case, stage):
    if case != "frozen meanwhile":
        compare(stage, frozen=[1] if case == "frozen" else (), **({"gradient_accumulation_steps": 3} if case == "accumulation" else {}))
        return
    found = []
    for split in (False, True):
        engine = start(split, stage)
        train(engine, 3)
        engine.module.layers[2].requires_grad_(False)
        train(engine, 2, first=3)
        engine.module.layers[2].requires_grad_(True)
        found.append(results(engine, 3, first=5))
        engine.destroy()
    same(found[1], found[0])


@on_ranks(2)
def test_hybrid_sharding():
    compare(3, zero={"zero_hpz_partition_size": 1})


@pytest.mark.parametrize("files", [False, True])
@on_ranks(2)
def test_built_under_init(files, tmp_path):
    found = []
    for split in (False, True):
        cfg = settings(split, 3, on_files(tmp_path, True, True) if files else None)
        with deepspeed.zero.Init(config_dict_or_path=cfg):
            model = tiny(width=WIDTH)
        engine = engine_of(model, cfg)
        settle(engine)
        found.append(results(engine, 5))
        engine.destroy()
    same(found[1], found[0])


@pytest.mark.parametrize("optimizer", [{"type": "Adam", "params": {"lr": 1e-2, "weight_decay": 0.1, "torch_adam": True}},
                                       {"type": "Lion", "params": {"lr": 1e-2, "weight_decay": 0.1}}, {"type": "Adagrad", "params": {"lr": 1e-2}},
                                       {"type": "SGD", "params": {"lr": 1e-2}},
                                       {"type": "SGD", "params": {"lr": 1e-2, "momentum": 0.9, "nesterov": True}}])
@on_ranks(2)
def test_every_optimizer_with_the_form(optimizer):
    compare(2, steps=6, optimizer=optimizer)


@pytest.mark.parametrize("stage,optimizer,parameters", [(1, True, False), (2, True, False), (3, True, False), (3, False, True), (3, True, True)])
@on_ranks(2)
def test_in_files(stage, optimizer, parameters, tmp_path):
    compare(stage, zero=on_files(tmp_path, optimizer, parameters))


def compare_apart(stage, where, folder):
    from deepspeed.engine import build
    usual = build.tiers_of
    build.tiers_of = lambda *_: TIERS[where](folder)
    try:
        with transport("c10d"):
            compare(stage, steps=6)
    finally:
        build.tiers_of = usual


@pytest.mark.parametrize("stage,where", [(1, "states"), (2, "states in files"), (3, "half the states"), (3, "all"), (3, "all in files")])
@pytest.mark.parametrize("ranks", [1, 2])
def test_on_the_host_apart(ranks, stage, where, tmp_path):
    run(compare_apart, ranks, stage, where, tmp_path)


# ------------------------------------------------------------------------------------------------------------------- checkpoints

@pytest.mark.parametrize("stage", [1, 3])
@on_ranks(2)
def test_checkpoints_go_either_way(stage, tmp_path):
    other = {1: 3, 3: 2}[stage]
    unbroken = start(False, stage)
    want = results(unbroken, 5)
    masters = {name: safe_get_full_fp32_param(p) for name, p in unbroken.module.named_parameters()}
    unbroken.destroy()
    for number, (first, second) in enumerate([(False, True), (True, False), (True, True)]):
        engine = start(first, stage)
        train(engine, 3)
        folder = str(tmp_path / f"saved{number}")
        engine.save_checkpoint(folder)
        engine.destroy()
        engine = start(second, other, seed=7)
        engine.load_checkpoint(folder)
        settle(engine)
        assert train(engine, 2, first=3) == want[0][3:]
        assert_same(whole(engine.module), want[1])
        assert_same({name: safe_get_full_fp32_param(p) for name, p in engine.module.named_parameters()}, masters)
        engine.destroy()


@on_ranks(2)
def test_the_files_are_the_same(tmp_path):
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
    saved = []
    for split, background in ((False, False), (True, False), (True, True)):
        folder = str(tmp_path / f"{split}{background}")
        engine = start(split, 2, **({"checkpoint": {"writer": {"decoupled": True}}} if background else {}))
        train(engine, 2)
        masters = {name: safe_get_full_fp32_param(p) for name, p in engine.module.named_parameters()}
        engine.save_checkpoint(folder)
        train(engine, 1, first=2)
        engine.destroy()
        dist.barrier()
        found = get_fp32_state_dict_from_zero_checkpoint(folder)
        assert_same({name: found[name] for name in masters}, masters)
        saved.append(found)
    assert_same(saved[1], saved[0])
    assert_same(saved[2], saved[0])


def _halve_the_head(src, dst):
    dst.load_state_dict(src)
    dst.head.weight.mul_(0.5)


@pytest.mark.parametrize("stage", [1, 3])
@on_ranks(2)
def test_weights_put_in_by_a_function(stage, tmp_path):
    saved = start(False, stage)
    train(saved, 2)
    saved.save_checkpoint(str(tmp_path / "saved"))
    saved.destroy()
    found = []
    for split in (False, True):
        engine = start(split, stage, seed=5)
        engine.load_checkpoint(str(tmp_path / "saved"), custom_load_fn=_halve_the_head)
        settle(engine)
        found.append(results(engine, 2))
        engine.destroy()
    same(found[1], found[0])


# ------------------------------------------------------------------------------------------------------------------- callers

@pytest.mark.parametrize("stage,files", [(1, False), (2, True), (3, False), (3, True)])
@on_ranks(2)
def test_what_callers_read_and_write(stage, files, tmp_path):
    found = []
    for split in (False, True):
        engine = start(split, stage, zero=on_files(tmp_path, True, stage == 3) if files else None)
        train(engine, 2)
        p = dict(engine.module.named_parameters())["layers.1.linear.weight"]
        safe_set_full_fp32_param(p, safe_get_full_fp32_param(p) * 1.37)
        safe_set_full_optimizer_state(p, safe_get_full_optimizer_state(p, "exp_avg") + 0.25, "exp_avg")
        settle(engine)
        mine = safe_get_local_fp32_param(p)
        assert type(mine) is torch.Tensor and mine.dtype == torch.float32
        safe_set_local_fp32_param(p, mine * 0.99)
        settle(engine)
        train(engine, 1, first=2)
        with deepspeed.zero.GatheredParameters([p], modifier_rank=0):
            if dist.get_rank() == 0 and stage == 3:   # elsewhere the block does nothing
                p.data[3] += 1
        train(engine, 1, first=3)
        state = engine.optimizer.state_dict()
        kept = {name: value.clone() for name, value in state_of(engine).items()}
        engine.optimizer.load_state_dict(state)
        assert_same(state_of(engine), kept)
        if files:
            engine.offload_states(device="nvme")
            with pytest.raises(RuntimeError, match="reload_states"):
                safe_get_full_fp32_param(p)
            engine.reload_states()
        settle(engine)
        assert_same(state_of(engine), kept)
        found.append(results(engine, 2, first=4))
        engine.destroy()
    same(found[1], found[0])


@pytest.mark.parametrize("stage", [0, 1, 3])
@on_ranks(2)
def test_what_users_write_into_parameters(stage):
    """The whole of a parameter, in place and by another tensor; with weights of which some low bits would make a NaN."""
    found = []
    for split in (False, True):
        engine = start(split, stage, zero={"stage3_param_persistence_threshold": 10**6})   # whole between steps at stage 3 too
        train(engine, 2)
        params = dict(engine.module.named_parameters())
        engine.backward(engine(batch(2, width=WIDTH).bfloat16()))
        with torch.no_grad():
            params["layers.0.linear.weight"].zero_()
            params["layers.1.linear.weight"].mul_(3)
            params["head.weight"].data = torch.full_like(params["head.weight"], 0.125)
            if stage == 3:
                params["layers.2.linear.weight"][3] = 0.5   # whose other elements keep their digits: the weights of before are still there
        engine.step()
        settle(engine)
        found.append(results(engine, 2, first=3))
        engine.destroy()
    same(found[1], found[0])
    assert all(torch.isfinite(value).all() for value in found[1][1].values())


@on_ranks(2)
def test_a_part_that_users_write():
    """Where whole parameters lie in memory, what is written there counts exactly, and the weights beside it as they are."""
    engine = start(True, 2)
    train(engine, 2)
    p = engine.module.layers[0].linear.weight
    loss = engine(batch(2, width=WIDTH).bfloat16())
    engine.backward(loss)
    for group in engine.optimizer.param_groups:
        group["lr"] = 0.0
        group["weight_decay"] = 0.0
    with torch.no_grad():
        p[3] = 0.5
    want = p.detach().clone()
    engine.step()
    assert torch.equal(p, want) and torch.equal(safe_get_full_fp32_param(p), want.float())
    p.data.zero_()   # leaves no trace; the digits that stay are no NaN
    engine.backward(engine(batch(3, width=WIDTH).bfloat16()))
    engine.step()
    assert torch.equal(safe_get_full_fp32_param(p).bfloat16(), torch.zeros_like(p))
    engine.destroy()


@on_ranks(2)
def test_the_groups_of_the_optimizer_hold_fp32_values():
    engine = start(True, 2)
    train(engine, 2)
    listed = [p for group in engine.optimizer.param_groups for p in group["params"]]
    segments = [(s, seg) for s in engine.optimizer.slices for seg in s.segments]
    assert len(listed) == len(segments)
    for p, (s, segment) in zip(listed, segments):
        value = s.master.narrow(0, segment.begin, segment.numel).made()
        assert isinstance(p, torch.nn.Parameter) and p.dtype == torch.float32 and p.numel() == segment.numel
        assert torch.equal(p.data.reshape(-1), value) and torch.equal(p.detach().clone().view(-1), value)
        assert p.norm().item() == value.norm().item() and p.shape == segment.parameter.shape
        with torch.no_grad():
            p.mul_(1.37)
        assert torch.equal(s.master.narrow(0, segment.begin, segment.numel).made(), value * 1.37)
        assert torch.equal(s.low.narrow(0, segment.begin, segment.numel), away_from_zero(value * 1.37))
    engine.destroy()


@on_ranks(1)
def test_what_has_no_such_form_is_refused():
    for section in ({"type": "Lamb", "params": {"lr": 1e-2}}, {"type": "RMSprop", "params": {"lr": 1e-2}}, {"type": "Muon", "params": {"lr": 1e-2}}):
        with pytest.raises(ValueError, match="bf16.split_master.*AdamW"):
            engine_of(tiny(), settings(True, 1, optimizer=section, zero_allow_untested_optimizer=True))
    for precision in ({}, {"fp16": {"enabled": True}}):
        with pytest.raises(deepspeed.DeepSpeedConfigError, match="bf16.split_master.*bf16.enabled"):
            engine_of(tiny(), config(1, bf16={"split_master": True}, **precision))


# ------------------------------------------------------------------------------------------------------------------- memory


def stack(width, layers):
    return torch.nn.Sequential(*(torch.nn.Linear(width, width, bias=False) for _ in range(layers)))


def stepped(stage, width, layers):
    engine = engine_of(stack(width, layers), settings(True, stage))
    engine.backward(engine(torch.ones(2, width, dtype=torch.bfloat16)).float().sum())
    engine.step()
    return engine


@pytest.mark.parametrize("stage", [1, 2, 3])
@on_ranks(1)
def test_twelve_bytes_a_parameter(stage):
    """What the engine counts and what the process takes: 16 M parameters, whose gradients (4 bytes each, and those on their way) come on top."""
    stepped(stage, 64, 2).destroy()   # what every first engine leaves
    width, layers = 1024, 16
    numel = width * width * layers
    gc.collect()
    before = field("VmRSS")
    engine = stepped(stage, width, layers)
    held = held_bytes(engine.optimizer)
    assert held["parameters"] + held["master_weights"] + held["optimizer_state"] == 12 * numel
    assert held["master_weights"] == 2 * numel == next(size for what, size, _ in places(engine.optimizer) if what == "master weights")
    others = held["gradients"] + held["gathered_units"] + held["buckets"]
    grown = field("VmRSS") - before - others
    assert grown < 12.25 * numel, f"{grown / numel:.2f} bytes a parameter, beside {others / numel:.2f} of gradients"
    engine.destroy()


@on_ranks(1)
def test_saving_and_loading_make_fp32_values_bit_by_bit(tmp_path):
    """42 M parameters: their fp32 values are 160 MiB."""
    engine = stepped(2, 2048, 10)
    for work in (engine.save_checkpoint, engine.load_checkpoint):
        work(str(tmp_path / "first"))
        grown = growth(lambda: work(str(tmp_path / "saved" if work == engine.save_checkpoint else tmp_path / "first")))
        assert grown < 112 << 20, f"{work.__name__}: {grown >> 20} MiB"
    engine.destroy()
