# SPDX-License-Identifier: Apache-2.0
"""safe_get_* and safe_set_*, whole state dicts, saving and loading of weights: every stage says the same."""
import pytest
import torch
import torch.distributed as dist

import deepspeed
from deepspeed.checkpoint import CheckpointError
from deepspeed.utils import (safe_get_full_fp32_param, safe_get_full_grad, safe_get_full_optimizer_state, safe_get_local_fp32_param,
                             safe_get_local_grad, safe_get_local_optimizer_state, safe_set_full_fp32_param, safe_set_full_grad,
                             safe_set_full_optimizer_state, safe_set_local_fp32_param, safe_set_local_grad,
                             safe_set_local_optimizer_state)
from tests.parity.launch import on_ranks, run
from tests.parity.tiny import assert_same, batch, config, engine_of, tiny, train, whole

STAGES = [0, 1, 2, 3]
BF16 = {"enabled": True}


def everything(stage, bf16=False):
    """What the accessors say after two steps and one backward."""
    engine = engine_of(tiny(), config(stage, **({"bf16": BF16} if bf16 else {})))
    first = next(engine.module.parameters())
    assert safe_get_full_grad(first) is None and safe_get_full_optimizer_state(first, "exp_avg") is None
    train(engine, 2)
    engine.backward(engine(batch(2).to(engine.get_data_types()[0])))
    found = {}
    for name, p in engine.module.named_parameters():
        for kind, value in (("fp32", safe_get_full_fp32_param(p)), ("grad", safe_get_full_grad(p)),
                            ("m", safe_get_full_optimizer_state(p, "exp_avg")), ("v", safe_get_full_optimizer_state(p, "exp_avg_sq"))):
            assert value.shape == p.shape and value.dtype == torch.float32, (name, kind)
            found[f"{name} {kind}"] = value
        assert safe_get_full_optimizer_state(p, "no such state") is None
    return found


@on_ranks(2)
@pytest.mark.parametrize("bf16", [False, True])
def test_getters_say_the_same_at_every_stage(bf16):
    expected = everything(0, bf16)
    for stage in (1, 2, 3):
        assert_same(everything(stage, bf16), expected)
    mine = torch.cat([value.flatten() for value in expected.values()])
    theirs = mine.clone()
    dist.broadcast(theirs, 0)
    assert torch.equal(mine, theirs)


@on_ranks(2)
@pytest.mark.parametrize("stage", [0, 3])
def test_older_accessors(stage):
    from deepspeed.utils import get_full_hp_grad, get_full_hp_param, set_full_hp_grad, set_full_hp_param
    engine = engine_of(tiny(), config(stage, bf16=BF16))
    train(engine, 1)
    p = engine.module.head.weight
    engine.backward(engine(batch(2).bfloat16()))
    assert torch.equal(get_full_hp_param(p), safe_get_full_fp32_param(p)) and torch.equal(get_full_hp_grad(p), safe_get_full_grad(p))
    assert torch.equal(get_full_hp_param(p, "exp_avg"), safe_get_full_optimizer_state(p, "exp_avg"))
    for number, (get, set_, key) in enumerate([(get_full_hp_param, set_full_hp_param, ()), (get_full_hp_grad, set_full_hp_grad, ()),
                                               (get_full_hp_param, set_full_hp_param, ("exp_avg",))]):
        set_(p, torch.full((1, 9), 1.0 + number), *key)
        assert (get(p, *key) == 1.0 + number).all()


@on_ranks(2)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("bf16", [False, True])
def test_setters(stage, bf16):
    engine = engine_of(tiny(), config(stage, gradient_clipping=0.0, **({"bf16": BF16} if bf16 else {})))
    train(engine, 1)
    p, others = engine.module.head.weight, whole(engine.module)
    safe_set_full_fp32_param(p, torch.full((1, 9), 2.5))
    assert (safe_get_full_fp32_param(p) == 2.5).all()
    now = whole(engine.module)
    assert (now.pop("head.weight") == 2.5).all()
    others.pop("head.weight")
    assert_same(now, others)
    engine.backward(engine(batch(1).to(p.dtype)))
    safe_set_full_grad(p, torch.zeros(1, 9))
    safe_set_full_optimizer_state(p, torch.zeros(1, 9), "exp_avg")
    safe_set_full_optimizer_state(p, torch.ones(1, 9), "exp_avg_sq")
    assert (safe_get_full_grad(p) == 0).all() and (safe_get_full_optimizer_state(p, "exp_avg_sq") == 1).all()
    engine.step()
    # No gradient, no momentum: weight decay alone.
    assert torch.equal(safe_get_full_fp32_param(p), torch.full((1, 9), 2.5).mul_(1 - 1e-2 * engine.optimizer.param_groups[0]["weight_decay"]))
    with pytest.raises(ValueError, match=r"head\.weight.*\(1, 9\).*\(9,\)"):
        safe_set_full_fp32_param(p, torch.zeros(9))


def _plain_clipped(change, clip):
    """Plain torch with the same gradients set: the norm, and the weights after SGD."""
    model = tiny()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(batch(0)).backward()
    for p in model.parameters():
        dist.all_reduce(p.grad)
        p.grad /= dist.get_world_size()
    change(dict(model.named_parameters()))
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    return norm.item(), {name: p.detach() for name, p in model.named_parameters()}


def _tenfold(params):
    params["head.weight"].grad *= 10
    params["layers.1.linear.bias"].grad.zero_()


@on_ranks(2)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("local", [False, True])
def test_clipping_sees_gradients_that_were_set(stage, local):
    """Against torch's own clipping; the norm of what was reduced before would clip far less."""
    engine = engine_of(tiny(), config(stage, gradient_clipping=0.25, optimizer={"type": "SGD", "params": {"lr": 0.1}}))
    engine.backward(engine(batch(0)))
    params = dict(engine.module.named_parameters())
    for name, factor in (("head.weight", 10.0), ("layers.1.linear.bias", 0.0)):
        p = params[name]
        if local:
            safe_set_local_grad(p, safe_get_local_grad(p) * factor)
        else:
            safe_set_full_grad(p, safe_get_full_grad(p) * factor)
    engine.step()
    norm, expected = _plain_clipped(_tenfold, 0.25)
    assert norm > 0.25 and engine.get_global_grad_norm() == pytest.approx(norm, rel=1e-5)
    for name, value in whole(engine.module).items():
        assert torch.allclose(value, expected[name], rtol=1e-5, atol=1e-6), name


@on_ranks(2)
@pytest.mark.parametrize("stage", [0, 3])
def test_a_bad_gradient_can_be_repaired_and_made(stage):
    engine = engine_of(tiny(), config(stage, bf16=BF16))
    for value, applied in ((0.5, True), (float("nan"), False), (0.5, True)):
        engine.backward(engine(batch(0).bfloat16()))
        if not applied or value == 0.5:
            safe_set_full_grad(engine.module.head.weight, torch.full((1, 9), float("nan")))
        if applied:
            safe_set_full_grad(engine.module.head.weight, torch.full((1, 9), value))
        engine.step()
        assert engine.was_step_applied() is applied


@on_ranks(2)
@pytest.mark.parametrize("stage", [1, 3])
def test_local_slices(stage):
    engine = engine_of(tiny(), config(stage))
    train(engine, 1)
    engine.backward(engine(batch(1)))
    total = 0
    for p in engine.module.parameters():
        mine = safe_get_local_fp32_param(p)
        count = torch.tensor(mine.numel())
        dist.all_reduce(count)
        assert mine.dim() == 1 and count == p.numel()
        assert safe_get_local_grad(p).shape == safe_get_local_optimizer_state(p, "exp_avg").shape == mine.shape
        safe_set_local_fp32_param(p, torch.full_like(mine, 1.5))
        safe_set_local_grad(p, torch.full_like(mine, 0.5))
        safe_set_local_optimizer_state(p, torch.full_like(mine, 0.25), "exp_avg")
        assert (safe_get_full_fp32_param(p) == 1.5).all() and (safe_get_full_grad(p) == 0.5).all()
        assert (safe_get_full_optimizer_state(p, "exp_avg") == 0.25).all()
        total += p.numel()
    assert all((value == 1.5).all() for value in whole(engine.module).values()) and total > 300


@on_ranks(2)
def test_gradients_are_unscaled_averages():
    engine = engine_of(tiny(), config(3, fp16={"enabled": True, "initial_scale_power": 10}))
    engine.backward(engine(batch(0).half()))
    model = tiny().half()
    model(batch(0).half()).backward()
    grad = model.head.weight.grad.float()
    dist.all_reduce(grad)
    assert torch.allclose(safe_get_full_grad(engine.module.head.weight), grad / 2, rtol=1e-2, atol=1e-3)


@on_ranks(2)
def test_untrained_parameters_have_none():
    model = tiny()
    model.head.weight.requires_grad_(False)
    engine = engine_of(model, config(3))
    train(engine, 1)
    engine.backward(engine(batch(1)))
    assert safe_get_full_grad(model.head.weight) is None and safe_get_full_optimizer_state(model.head.weight, "exp_avg") is None
    with pytest.raises(ValueError, match="head.weight"):
        safe_set_full_optimizer_state(model.head.weight, torch.zeros(1, 9), "exp_avg")
    assert safe_get_full_fp32_param(torch.nn.Parameter(torch.zeros(2))) is None


# --------------------------------------------------------------------------------------------------------------- whole weights


def plain_state(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


@on_ranks(2)
@pytest.mark.parametrize("stage", STAGES)
def test_state_dict_is_real_or_refuses(stage):
    engine = engine_of(tiny(), config(stage))
    expected = plain_state(tiny())
    if stage == 3:
        for ask in (engine.module.state_dict, engine.state_dict, engine.module_state_dict):
            with pytest.raises(RuntimeError, match=r"^state_dict\(\): 18 parameters.*save_16bit_model.*GatheredParameters"):
                ask()
        with pytest.raises(RuntimeError, match=r"^load_state_dict\(\): 18 parameters.*load_module_state_dict"):
            engine.module.load_state_dict(expected)
        with deepspeed.zero.GatheredParameters(engine.module.parameters()):
            assert_same(plain_state(engine.module), expected)
    else:
        assert_same(engine.module.state_dict(), expected)
        assert_same(engine.module_state_dict(), expected)
        assert set(engine.state_dict()) == {"module." + name for name in expected}


@on_ranks(2)
def test_consolidated_state_dict():
    model = tiny()
    model.tied = model.head
    model.layers[0].linear.weight.requires_grad_(False)
    engine = engine_of(model, config(3))
    state = engine._zero3_consolidated_16bit_state_dict()
    if dist.get_rank() == 0:
        assert state["tied.weight"].data_ptr() == state["head.weight"].data_ptr()
        assert "seen" in state and "scratch" not in state
        assert_same({name: value for name, value in state.items() if not name.startswith("tied")}, plain_state(tiny()))
        assert all(value.device.type == "cpu" for value in state.values())
    else:
        assert state is None
    state = engine._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters=True)
    assert state is None or "layers.0.linear.weight" not in state
    other = engine_of(tiny(), config(2))
    with pytest.raises(ValueError):
        other._zero3_consolidated_16bit_state_dict()


def _save(stage, folder):
    gather = {"stage3_gather_16bit_weights_on_model_save": True}
    engine = engine_of(tiny(), config(stage, bf16=BF16, zero=gather))
    assert engine.save_16bit_model(folder, "weights.bin") is True
    dist.barrier()
    state = torch.load(f"{folder}/weights.bin", weights_only=True)
    assert_same({k: v.float() for k, v in state.items()}, {k: v.bfloat16().float() for k, v in plain_state(tiny()).items()})
    engine = engine_of(tiny(), config(stage, zero={"stage3_gather_16bit_weights_on_model_save": False}))
    assert engine.save_16bit_model(folder, "other.bin") is (stage != 3)


@pytest.mark.parametrize("stage", STAGES)
def test_save_16bit_model(stage, tmp_path):
    run(_save, 2, stage, str(tmp_path))
    assert (tmp_path / "weights.bin").exists() and (tmp_path / "other.bin").exists() == (stage != 3)
    assert not list(tmp_path.glob("*.part*"))


@on_ranks(2)
def test_weights_that_cannot_be_written_are_an_error_on_all_ranks(tmp_path):
    engine = engine_of(tiny(), config(3, zero={"stage3_gather_16bit_weights_on_model_save": True}))
    (tmp_path / "a file").touch()
    with pytest.raises(CheckpointError, match="failed on rank 0: FileExistsError"):
        engine.save_16bit_model(tmp_path / "a file", "weights.bin")
    (tmp_path / "other" / "weights.bin").mkdir(parents=True, exist_ok=True)
    with pytest.raises(CheckpointError, match="failed on rank 0: IsADirectoryError"):
        engine.save_16bit_model(tmp_path / "other", "weights.bin")
    assert [p.name for p in (tmp_path / "other").iterdir()] == ["weights.bin"]
    assert engine.save_16bit_model(tmp_path, "weights.bin") is True


@on_ranks(2)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("bf16", [False, True])
def test_load_module_state_dict(stage, bf16):
    engine = engine_of(tiny(), config(stage, **({"bf16": BF16} if bf16 else {})))
    train(engine, 1)
    wanted = plain_state(tiny(seed=8))
    engine.load_module_state_dict({"module": wanted})
    expected = {name: p.detach() for name, p in tiny(seed=8).named_parameters()}
    if not bf16:
        assert_same(whole(engine.module), expected)
    for name, p in engine.module.named_parameters():
        assert torch.equal(safe_get_full_fp32_param(p), expected[name].bfloat16().float() if bf16 else expected[name]), name
    with pytest.raises(RuntimeError, match="head.weight"):
        engine.load_module_state_dict({name: value for name, value in wanted.items() if name != "head.weight"})
    engine.load_module_state_dict({name: value for name, value in wanted.items() if name != "head.weight"}, strict=False)
    train(engine, 1, first=1)
