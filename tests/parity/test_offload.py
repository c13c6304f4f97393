# SPDX-License-Identifier: Apache-2.0
"""State that rests in files gives the same training, bit for bit, and nothing in the folder outlives a process."""
import os

import pytest
import torch
import torch.distributed as dist

import deepspeed
from deepspeed import DeepSpeedConfigError
from deepspeed.utils import (safe_get_full_fp32_param, safe_get_full_grad, safe_get_full_optimizer_state, safe_set_full_fp32_param,
                             safe_set_full_grad, safe_set_full_optimizer_state)
from deepspeed.zero.accounting import places
from tests.parity.launch import on_ranks
from tests.parity.resident import growth
from tests.parity.tiny import assert_same, batch, config, engine_of, tiny, train, whole

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


@pytest.mark.parametrize("case", ["accumulation", "overflow", "frozen", "hybrid"])
@on_ranks(2)
def test_the_same_bits_with(case, tmp_path):
    more = {"accumulation": {"gradient_accumulation_steps": 3}, "overflow": {"fp16": {"enabled": True, "initial_scale_power": 30}}}.get(case, {})
    zero = {"zero_hpz_partition_size": 1} if case == "hybrid" else {}
    results = []
    for files in ({}, on_files(tmp_path, True, True)):
        model = tiny(width=65)
        if case == "frozen":
            model.layers[1].requires_grad_(False)
        engine = engine_of(model, config(3, zero={**files, **zero}, **{"bf16": {"enabled": case != "overflow"}, **more}))
        losses = train(engine, 12, width=65)
        results.append((losses, whole(engine.module), engine.skipped_steps))
        engine.destroy()
    assert results[0][0] == results[1][0] and results[0][2] == results[1][2]
    assert (results[0][2] > 0) == (case == "overflow")
    assert_same(results[0][1], results[1][1])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@on_ranks(1)
def test_one_rank_frees_its_parameters_too(precision, tmp_path):
    want = trained(3, precision, {}, steps=5)
    same(trained(3, precision, on_files(tmp_path, True, True), steps=5), want)


@on_ranks(2)
def test_all_state_is_where_it_was_asked_for(tmp_path):
    engine = engine_of(tiny(width=65), config(3, zero=on_files(tmp_path, True, True), bf16={"enabled": True}))
    train(engine, 1, width=65)
    managed, stepper = engine._managed, engine.optimizer.stepper
    held = [t for s in engine.optimizer.slices for t in (s.master, managed.reducer.grad_slice(s.flat))]
    held += [t for number in range(len(engine.optimizer.slices)) for t in stepper.memory_of(number)]
    assert held and all(managed.rests_elsewhere(t) for t in held)
    sizes = {(what, where) for what, _, where in places(engine.optimizer)}
    assert {("parameters", str(tmp_path)), ("master weights", str(tmp_path)), ("optimizer states", str(tmp_path))} <= sizes
    assert managed.store.bytes()["parameters_in_files"] == managed.store.bytes()["parameters"]
    engine.destroy()


@on_ranks(2)
def test_some_parameters_stay_in_memory(tmp_path):
    zero = on_files(tmp_path, False, True)
    zero["offload_param"]["max_in_cpu"] = 5000   # of this rank's 8700
    engine = engine_of(tiny(width=65), config(3, zero=zero))
    store = engine._managed.store.bytes()
    assert 0 < store["parameters"] - store["parameters_in_files"] <= 4 * 5000
    train(engine, 2, width=65)
    engine.destroy()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@on_ranks(2)
def test_checkpoints_go_either_way(precision, tmp_path):
    """Saved from files and continued in memory, and the other way round: the same bits as training that never stopped."""
    settings = {"bf16": {"enabled": True}} if precision == "bf16" else {}
    wanted = engine_of(tiny(width=65), config(3, **settings))
    train(wanted, 5, width=65)
    want, want_states = whole(wanted.module), wanted.optimizer.state_dict()["state"]
    for number, (first, second) in enumerate([({}, on_files(tmp_path, True, True)), (on_files(tmp_path, True, True), {}),
                                              (on_files(tmp_path, True, True), on_files(tmp_path, True, True))]):
        engine = engine_of(tiny(width=65), config(3, zero=first, **settings))
        train(engine, 3, width=65)
        engine.save_checkpoint(str(tmp_path / f"saved{number}"))
        engine.destroy()
        engine = engine_of(tiny(7, width=65), config(3, zero=second, **settings))
        engine.load_checkpoint(str(tmp_path / f"saved{number}"))
        train(engine, 2, first=3, width=65)
        assert_same(whole(engine.module), want)
        for name, entry in engine.optimizer.state_dict()["state"].items():
            for key, value in entry.items():
                assert torch.equal(torch.as_tensor(value), torch.as_tensor(want_states[name][key])), (name, key)
        engine.destroy()
    wanted.destroy()


@on_ranks(2)
def test_what_callers_read_and_write(tmp_path):
    engines = [engine_of(tiny(width=65), config(3, zero=zero, bf16={"enabled": True})) for zero in ({}, on_files(tmp_path, True, True))]
    for engine in engines:
        train(engine, 2, width=65)
        p = dict(engine.module.named_parameters())["layers.1.linear.weight"]
        safe_set_full_fp32_param(p, safe_get_full_fp32_param(p) * 1.5)
        safe_set_full_optimizer_state(p, safe_get_full_optimizer_state(p, "exp_avg") + 0.25, "exp_avg")
        with deepspeed.zero.GatheredParameters([p], modifier_rank=0):
            if dist.get_rank() == 0:
                p.data[3] += 1
        loss = engine(batch(9, width=65).bfloat16())
        engine.backward(loss)
        safe_set_full_grad(p, safe_get_full_grad(p) * 2)
        engine.step()
        state = engine.optimizer.state_dict()
        engine.optimizer.load_state_dict(state)
        engine.offload_states()
        engine.reload_states()
    assert_same(whole(engines[1].module), whole(engines[0].module))
    for engine in engines:
        engine.destroy()


@on_ranks(2)
def test_built_straight_into_files(tmp_path):
    cfg = config(3, zero=on_files(tmp_path, True, True), bf16={"enabled": True})
    with deepspeed.zero.Init(config_dict_or_path=cfg, remote_device="nvme"):
        model = tiny(width=65)
    home = next(model.parameters()).ds_home
    assert home.owner.store.bytes()["parameters_in_files"] > 0
    engine = engine_of(model, cfg)
    losses = train(engine, 3, width=65)
    plain = config(3, bf16={"enabled": True})
    with deepspeed.zero.Init(config_dict_or_path=plain):
        model = tiny(width=65)
    other = engine_of(model, plain)
    assert train(other, 3, width=65) == losses
    assert_same(whole(engine.module), whole(other.module))
    engine.destroy()
    other.destroy()


@on_ranks(2)
def test_evaluation_only(tmp_path):
    zero = on_files(tmp_path, False, True)
    outputs = []
    for part in ({}, zero):
        engine = engine_of(tiny(width=65), config(3, zero=part, optimizer=None))
        with torch.no_grad():
            outputs.append(engine(batch(0, width=65)))
        engine.destroy()
    assert torch.equal(*outputs)


@pytest.mark.parametrize("optimizer", ["Lion", "Adagrad", "SGD"])
@on_ranks(2)
def test_other_optimizers(optimizer, tmp_path):
    section = {"type": optimizer, "params": {"lr": 1e-2, **({"momentum": 0.9} if optimizer == "SGD" else {})}}
    want = trained(2, "bf16", {}, steps=6, optimizer=section)
    same(trained(2, "bf16", on_files(tmp_path), steps=6, optimizer=section), want)


@on_ranks(1)
def test_an_optimizer_that_cannot_rest_there_says_so(tmp_path):
    for section in ({"type": "Lamb", "params": {"lr": 1e-2}}, {"type": "RMSprop", "params": {"lr": 1e-2}}):
        with pytest.raises(ValueError, match="offload_optimizer.device.*Adam"):
            engine_of(tiny(), config(2, zero=on_files(tmp_path), optimizer=section, zero_allow_untested_optimizer=True,
                                     zero_force_ds_cpu_optimizer=False))


@on_ranks(1)
def test_a_folder_that_cannot_be_used_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="offload_optimizer.nvme_path"):
        engine_of(tiny(), config(2, zero=on_files(tmp_path / "file" / "below")))
    zero = on_files(tmp_path)
    del zero["offload_optimizer"]["nvme_path"]
    with pytest.raises(DeepSpeedConfigError, match="zero_optimization.offload_optimizer.nvme_path.*missing"):
        engine_of(tiny(), config(2, zero=zero))


@on_ranks(2)
def test_memory_is_bounded(tmp_path):
    """20 M parameters, 360 MB of state: what training adds to the process are two units, the gradients on their way and the tiles."""
    width, layers = 1024, 18
    cfg = config(3, zero={**on_files(tmp_path, True, True), "stage3_prefetch_bucket_size": width * width}, bf16={"enabled": True})
    with deepspeed.zero.Init(config_dict_or_path=cfg):
        model = tiny(width=width, layers=layers)
    engines = []

    def start():
        engines.append(engine_of(model, cfg))
        train(engines[0], 3, width=width)

    grown, engine = growth(start), engines[0]
    unit = 2 * width * (width + 3)
    parameters = sum(p.ds_numel for p in engine.module.parameters())
    assert parameters > 18e6
    allowed = 8 * unit + 3 * 4 * (4 << 20) + (48 << 20)   # gathered and gradients, tiles, and what the first steps leave in the heap
    assert grown < allowed < 9 * parameters, f"{grown >> 20} MiB, allowed {allowed >> 20}"
    for work in (engine.save_checkpoint, engine.load_checkpoint):   # 7 bytes a parameter lie in this rank's files
        grown = growth(lambda: work(str(tmp_path / "saved")))
        assert grown < 88 << 20 < 7 * parameters, f"{work.__name__}: {grown >> 20} MiB"
    engine.destroy()
