# SPDX-License-Identifier: Apache-2.0
"""Updates that are computed beside backward (offload_optimizer.super_offload): the bits of a step after backward, whatever happens in between, and
nothing that anybody can see before the step."""
import os

import pytest
import torch
import torch.distributed as dist

from deepspeed._native import lib
from deepspeed.utils import (safe_get_full_fp32_param, safe_get_full_grad, safe_get_full_optimizer_state, safe_set_full_fp32_param,
                             safe_set_full_grad, safe_set_full_optimizer_state)
from deepspeed.zero.tiers import Tiers
from tests.parity.launch import on_ranks, run
from tests.parity.test_offload import on_files
from tests.parity.tiny import assert_same, batch, config, engine_of, tiny, train, whole
from tests.parity.training import transport

WIDTH = 65
BF16 = {"bf16": {"enabled": True}}
OF_PRECISION = {"fp32": {}, "bf16": BF16, "split": {"bf16": {"enabled": True, "split_master": True}}}


def ahead(folder, parameters=False):
    zero = on_files(folder, True, parameters)
    zero["offload_optimizer"]["super_offload"] = True
    return zero


def states(engine):
    return {f"{name}/{key}": value.clone() for name, entry in engine.optimizer.state_dict()["state"].items() for key, value in entry.items()
            if torch.is_tensor(value)}


def trained(stage, zero, steps=12, between=None, model=None, **settings):
    """(losses, parameters, states, share of slices that had been computed when their step came). between(engine, step): after each backward."""
    engine = engine_of(model or tiny(width=WIDTH), config(stage, zero=zero, **{"gradient_clipping": 0.0, **settings}))
    losses, dtype = [], engine.get_data_types()[0]
    for step in range(steps):
        loss = engine(batch(step, width=WIDTH).to(dtype))
        engine.backward(loss)
        if between is not None:
            between(engine, step)
        engine.step()
        losses.append(loss.item())
    share = engine.optimizer.stepper.native.speculated / (len(engine.optimizer.slices) * steps)
    result = losses, whole(engine.module), states(engine), share
    engine.destroy()
    return result


def same(got, want):
    assert got[0] == want[0]
    assert_same(got[1], want[1])
    assert_same(got[2], want[2])
    assert want[3] == 0


@pytest.mark.parametrize("precision", OF_PRECISION)
@pytest.mark.parametrize("stage,parameters", [(1, False), (2, False), (3, False), (3, True)])
@on_ranks(2)
def test_the_same_bits(stage, parameters, precision, tmp_path):
    settings = OF_PRECISION[precision]
    want = trained(stage, {}, steps=50, gradient_clipping=120.0, **settings)   # about half of the steps are clipped
    got = trained(stage, ahead(tmp_path, parameters), steps=50, gradient_clipping=120.0, **settings)
    same(got, want)
    assert 0.1 < got[3] < 0.9


def _apart(stage, where, precision, folder):
    from deepspeed.engine import build
    kinds = {"host": lambda: lib().HostRest(False, 4096, True),
             "files": lambda: lib().FileRest(str(folder), 3, 4096, 4096, 4, 2, apart=True, second_places=True)}
    settings = OF_PRECISION[precision]
    with transport("c10d"):
        want = trained(stage, {}, **settings)
        usual = build.tiers_of
        build.tiers_of = lambda *_: Tiers(rest=kinds[where](), speculates=True)
        try:
            got = trained(stage, {}, **settings)
        finally:
            build.tiers_of = usual
    same(got, want)
    assert got[3] == 11 / 12   # the first step has no states yet


@pytest.mark.parametrize("precision", OF_PRECISION)
@pytest.mark.parametrize("stage,where", [(1, "host"), (2, "files"), (3, "host")])
@pytest.mark.parametrize("ranks", [1, 2])
def test_on_the_host_of_a_device(ranks, stage, where, precision, tmp_path):
    run(_apart, ranks, stage, where, precision, tmp_path)


def _first_weight(engine):
    return next(iter(engine.module.parameters()))


def _learning_rate(engine, step):
    for group in engine.optimizer.param_groups:
        group["lr"] = 1e-2 / (step + 1)


def _weight(engine, step):
    p = _first_weight(engine)
    safe_set_full_fp32_param(p, safe_get_full_fp32_param(p) + 0.5)


def _weight_in_place(engine, step):
    import deepspeed
    p = _first_weight(engine)
    with deepspeed.zero.GatheredParameters([p], modifier_rank=0), torch.no_grad():
        if dist.get_rank() == 0:
            p.add_(0.5)


def _state(engine, step):
    p = _first_weight(engine)
    if step:
        safe_set_full_optimizer_state(p, safe_get_full_optimizer_state(p, "exp_avg") * 0.5, "exp_avg")


def _state_through_torch(engine, step):
    for entry in engine.optimizer.state.values():
        entry["exp_avg"].mul_(0.5)


def _gradient(engine, step):
    p = _first_weight(engine)
    safe_set_full_grad(p, safe_get_full_grad(p) * 3)


def _another_backward(engine, step):
    engine.backward(engine(batch(100 + step, width=WIDTH).to(engine.get_data_types()[0])))


def _start_again(engine, step):
    engine.zero_grad()
    engine.optimizer.zero_grad()
    _another_backward(engine, step)


def _start_again_without_the_engine(engine, step):
    engine.zero_grad()
    engine(batch(100 + step, width=WIDTH).to(engine.get_data_types()[0])).backward()


def _no_gradient(engine, step):
    if step % 3 == 1:
        engine.optimizer.zero_grad()


def _gradient_through_torch(engine, step):
    reducer = engine._managed.reducer
    for s in engine.optimizer.slices:
        reducer.grad_slice(s.flat).mul_(0.5)


BETWEEN = [_learning_rate, _weight, _weight_in_place, _state, _state_through_torch, _gradient, _another_backward, _start_again,
           _start_again_without_the_engine, _no_gradient, _gradient_through_torch]


@pytest.mark.parametrize("precision", OF_PRECISION)
@pytest.mark.parametrize("between", BETWEEN, ids=lambda f: f.__name__.strip("_"))
@on_ranks(2)
def test_what_changes_between_backward_and_step_counts(between, precision, tmp_path):
    settings = OF_PRECISION[precision]
    same(trained(3, ahead(tmp_path, True), 6, between, **settings), trained(3, {}, 6, between, **settings))


@on_ranks(2)
def test_nothing_is_seen_before_the_step(tmp_path):
    engine = engine_of(tiny(width=WIDTH), config(3, zero=ahead(tmp_path, True), gradient_clipping=0.0, **BF16))
    p = _first_weight(engine)
    for step in range(5):
        before = whole(engine.module)
        kept = states(engine)
        engine.backward(engine(batch(step, width=WIDTH).bfloat16()))
        engine.optimizer.stepper.native.wait_ahead()
        assert_same(whole(engine.module), before)
        assert_same(states(engine), kept)
        engine.step()
        assert not torch.equal(safe_get_full_fp32_param(p).bfloat16().view(-1), before["layers.0.norm.weight"].view(-1))
    assert engine.optimizer.stepper.native.speculated > 0
    engine.destroy()


def _taken(folder):
    """Bytes that this process's nameless files of the folder take on the disk."""
    links = {os.path.join("/proc/self/fd", fd) for fd in os.listdir("/proc/self/fd")}
    held = [link for link in links if os.path.islink(link) and os.readlink(link).startswith(str(folder))]
    return sum({info.st_ino: 512 * info.st_blocks for info in map(os.stat, held)}.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage,in_advance", [(1, True), (3, False), (3, True)])
@on_ranks(2)
def test_the_disk_space_is_there_from_the_beginning(stage, in_advance, precision, tmp_path):
    zero = ahead(tmp_path)
    zero["offload_optimizer"]["super_offload"] = in_advance
    engine = engine_of(tiny(width=WIDTH), config(stage, zero=zero, gradient_clipping=0.0, **(BF16 if precision == "bf16" else {})))
    taken, made = _taken(tmp_path), engine._managed.tiers.rest.bytes
    train(engine, 3, width=WIDTH)
    assert made < engine._managed.tiers.rest.bytes <= taken   # a file system may add blocks of its own later
    engine.destroy()


@pytest.mark.parametrize("case", ["accumulation", "overflow", "frozen", "lion", "sgd"])
@on_ranks(2)
def test_the_same_bits_with(case, tmp_path):
    settings = {"accumulation": {"gradient_accumulation_steps": 3, **BF16},
                "overflow": {"fp16": {"enabled": True, "initial_scale_power": 19, "loss_scale_window": 3}},
                "lion": {"optimizer": {"type": "Lion", "params": {"lr": 1e-3}}, **BF16},
                "sgd": {"optimizer": {"type": "SGD", "params": {"lr": 1e-3, "momentum": 0.9}}, **BF16}}.get(case, BF16)

    def between(engine, step):
        if case == "frozen":   # and thawed again
            engine.module.layers[2].requires_grad_(step % 4 < 2)

    results = []
    for zero in (ahead(tmp_path, True), {}):
        results.append(trained(3, zero, 12, between, **settings))
    same(*results)
    assert results[0][3] > 0


@pytest.mark.parametrize("what", [{"load_optimizer_states": False}, {"load_module_only": True}], ids=["without_states", "module_only"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@on_ranks(2)
def test_loaded_weights_between_backward_and_step(precision, what, tmp_path):
    def between(engine, step):
        if step == 1:
            engine.save_checkpoint(str(tmp_path / "saved"), tag="one")
        elif step == 3:
            engine.load_checkpoint(str(tmp_path / "saved"), tag="one", **what)

    settings = BF16 if precision == "bf16" else {}
    same(trained(3, ahead(tmp_path), 5, between, **settings), trained(3, {}, 5, between, **settings))


@on_ranks(2)
def test_a_checkpoint_between_backward_and_step(tmp_path):
    """What is saved is of before the step; what is loaded ends the speculation."""
    engine = engine_of(tiny(width=WIDTH), config(3, zero=ahead(tmp_path, True), gradient_clipping=0.0, **BF16))
    for step in range(3):
        engine.backward(engine(batch(step, width=WIDTH).bfloat16()))
        engine.step()
    want = whole(engine.module)
    engine.save_checkpoint(str(tmp_path / "saved"))
    engine.backward(engine(batch(3, width=WIDTH).bfloat16()))
    engine.load_checkpoint(str(tmp_path / "saved"))
    assert_same(whole(engine.module), want)
    after = []
    for _ in range(2):   # the first time from the gradients of that backward's successor, the second time with nothing in between
        engine.backward(engine(batch(3, width=WIDTH).bfloat16()))
        engine.step()
        after.append(whole(engine.module))
        engine.load_checkpoint(str(tmp_path / "saved"))
    assert_same(after[0], after[1])
    engine.destroy()
