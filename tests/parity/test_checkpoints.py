# SPDX-License-Identifier: Apache-2.0
"""Training that goes on from a checkpoint is the training that was not interrupted, at any stage and on any number of ranks."""
import json
import os
import threading

import pytest
import torch
import torch.distributed as dist

from deepspeed.checkpoint import Checkpoint, CheckpointError, save
from tests.parity.everything import assert_same, config, everything, rows, start, state, train
from tests.parity.launch import on_ranks, run

STAGES = (0, 1, 2, 3)


def resume(folder, precision):
    """On each stage: 3 updates, save, 3 more; a new engine of other weights loads and goes on."""
    for stage in STAGES:
        where = os.path.join(folder, str(stage))
        cfg = config(stage, precision, accumulation=2)
        engine = start(cfg, everything(dropout=0.3))
        train(engine, 3)
        assert engine.save_checkpoint(where, client_state={"epoch": 4, "best": torch.tensor([1.5])})
        want, scale, lr = train(engine, 3, 3), engine.loss_scale(), engine.get_lr()
        final = state(engine)
        engine.destroy()

        torch.manual_seed(99)
        engine = start(cfg, everything(seed=8, dropout=0.3))
        path, client = engine.load_checkpoint(where)
        assert path == os.path.join(where, "global_step3") and client["epoch"] == 4 and torch.equal(client["best"], torch.tensor([1.5]))
        assert engine.global_steps == 3 and engine.global_samples == 3 * engine.train_batch_size() and engine.micro_steps == 6
        assert train(engine, 3, 3) == want, f"stage {stage}"
        assert (engine.loss_scale(), engine.get_lr()) == (scale, lr)
        assert_same(state(engine), final)
        engine.destroy()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_resume_is_exact(precision, tmp_path):
    run(resume, 2, str(tmp_path), precision)


def save_at(folder, stage, precision):
    """(state, losses of two more updates averaged over ranks)"""
    world = dist.get_world_size()
    engine = start(config(stage, precision, micro=12 // world))
    train(engine, 3)
    engine.save_checkpoint(folder)
    saved = state(engine)
    losses = mean_losses(engine)
    engine.destroy()
    return {key: value.float() for key, value in saved.items()}, losses


def mean_losses(engine):
    losses = torch.tensor(train(engine, 2, 3))
    dist.all_reduce(losses)
    return (losses / dist.get_world_size()).tolist()


def load_at(folder, stage, precision, want, losses):
    engine = start(config(stage, precision, micro=12 // dist.get_world_size()), everything(seed=5))
    engine.load_checkpoint(folder)
    assert_same({key: value.float() for key, value in state(engine).items()}, want)
    torch.testing.assert_close(mean_losses(engine), losses, rtol=1e-5 if precision == "fp32" else 2e-2, atol=1e-6)
    engine.destroy()


@pytest.mark.parametrize("before, after", [(2, 1), (2, 4), (4, 3)])
def test_another_number_of_ranks(before, after, tmp_path):
    """And another stage: each stage's checkpoint is loaded at the next stage."""
    for stage in STAGES:
        folder = str(tmp_path / str(stage))
        want, losses = run(save_at, before, folder, stage, "fp32")[0]
        run(load_at, after, folder, (stage + 1) % 4, "fp32", want, losses)


def another_precision(folder):
    engine = start(config(2, "bf16"))
    train(engine, 3)
    engine.save_checkpoint(folder)
    want = state(engine)
    engine.destroy()
    for precision in ("fp32", "fp16", "bf16"):
        engine = start(config(3, precision), everything(seed=5))
        engine.load_checkpoint(folder)
        got = state(engine)
        for key, value in want.items():
            if key[1] != "buffer":
                close = value if key[1] != "weight" else value.to(got[key].dtype)
                assert torch.equal(got[key], close), (precision, key)
        train(engine, 1, 3)
        engine.destroy()


def test_another_precision(tmp_path):
    run(another_precision, 2, str(tmp_path))


def hybrid(folder):
    """Blocks of 2 ranks, replicated; every rank writes a part, and any layout reads it."""
    engine = start(config(3, zero={"zero_hpz_partition_size": 2}, micro=3))
    train(engine, 2)
    engine.save_checkpoint(folder)
    want = state(engine)
    engine.destroy()
    for stage, size in ((3, 2), (1, 1)):
        engine = start(config(stage, zero={"zero_hpz_partition_size": size} if stage == 3 else {}, micro=3), everything(seed=5))
        engine.load_checkpoint(folder)
        assert_same(state(engine), want)
        engine.destroy()
    if dist.get_rank() == 0:
        writers = {piece[0] for info in Checkpoint(os.path.join(folder, "global_step2")).tensors.values() for piece in info.pieces}
        assert len([w for w in writers if w.startswith("state")]) == 4


def test_hybrid_sharding(tmp_path):
    run(hybrid, 4, str(tmp_path))


# ---- other optimizers


def optimizer_of(kind, model):
    trained = [p for p in model.parameters() if p.requires_grad and p.numel()]
    if kind == "sgd":
        return torch.optim.SGD(trained, lr=1e-2, momentum=0.9)
    if kind == "amsgrad":
        return torch.optim.AdamW(trained, lr=1e-2, amsgrad=True)
    if kind == "rmsprop":
        return torch.optim.RMSprop(trained, lr=1e-3, momentum=0.5)
    if kind == "adagrad":
        return torch.optim.Adagrad(trained, lr=1e-2)
    return None


def resume_with(folder, kind):
    for stage in (0, 3):
        where = os.path.join(folder, str(stage))
        cfg = config(stage, "bf16", zero_allow_untested_optimizer=True)
        cfg.pop("scheduler")
        if kind in ("Lion", "Lamb", "Muon"):
            cfg["optimizer"] = {"type": kind, "params": {"lr": 1e-3}}
        else:
            cfg.pop("optimizer")

        def begin(seed):
            model = everything(seed=seed)
            return start(cfg, model, optimizer=optimizer_of(kind, model))

        engine = begin(3)
        train(engine, 2)
        engine.save_checkpoint(where)
        want = train(engine, 2, 2)
        engine.destroy()
        engine = begin(8)
        train(engine, 1)   # it has states of its own, which must go
        engine.load_checkpoint(where)
        assert train(engine, 2, 2) == want, f"stage {stage}"
        engine.destroy()


@pytest.mark.parametrize("kind", ["Muon", "Lion", "Lamb", "sgd", "adagrad", "amsgrad", "rmsprop"])
def test_optimizers_resume(kind, tmp_path):
    run(resume_with, 2, str(tmp_path), kind)


@on_ranks(2)
def test_another_optimizer_starts_anew_or_takes_over(tmp_path):
    engine = start(config(2))
    train(engine, 3)
    engine.save_checkpoint(tmp_path)
    want = state(engine)
    engine.destroy()
    # Lion keeps the first of Adam's two states, SGD none of them.
    for kind, common in (("Lion", "exp_avg"), ("SGD", None)):
        engine = start(config(1, optimizer={"type": kind, "params": {"lr": 1e-3}}), everything(seed=5))
        engine.load_checkpoint(tmp_path)
        got = state(engine)
        for name, key in want:
            if key == "fp32":
                assert torch.equal(got[name, key], want[name, key])
            elif key == common:
                assert torch.equal(got[name, key], want[name, key])
        assert engine.optimizer.stepper.steps == (3 if common else 0)
        assert engine.optimizer.param_groups[0]["weight_decay"] == 0.0
        train(engine, 1, 3)
        engine.destroy()


def late_ones(folder, kind):
    """Each parameter in turn is off for its own number of updates, so that every rank steps some that are late."""
    for stage in (0, 1, 3):
        where = os.path.join(folder, str(stage))
        cfg = config(stage, optimizer={"type": kind, "params": {"lr": 1e-2}})
        engine = start(cfg)
        names = [name for name, p in engine.module.named_parameters() if p.requires_grad and p.numel()]
        for step in range(len(names)):
            for number, name in enumerate(names):
                engine.module.get_parameter(name).requires_grad_(number <= step)
            train(engine, 1, step)
        engine.save_checkpoint(where)
        want = train(engine, 2, 9)
        final = state(engine)
        engine.destroy()
        checkpoint = Checkpoint(os.path.join(where, f"global_step{len(names)}"))
        counted = {name for name in names if not (kind == "Muon" and checkpoint.tensors.get((name, "momentum_buffer")))}
        late = {name: number for number, name in enumerate(names) if number and name in counted}
        assert late and checkpoint.state["optimizer"]["missed_steps"] == late, f"stage {stage}"
        engine = start(cfg, everything(seed=8))
        engine.load_checkpoint(where)
        assert train(engine, 2, 9) == want, f"stage {stage}"
        assert_same(state(engine), final)
        engine.destroy()


@pytest.mark.parametrize("kind", ["AdamW", "Muon"])
def test_parameters_that_missed_updates_keep_their_own_count(kind, tmp_path):
    run(late_ones, 2, str(tmp_path), kind)


# ---- loading into an engine that has trained, and parts of loads


@on_ranks(2)
def test_into_an_engine_that_has_trained(tmp_path):
    engine = start(config(3, "bf16", accumulation=2))
    train(engine, 2)
    engine.save_checkpoint(tmp_path, tag="best", save_latest=False)
    want = state(engine)
    losses = train(engine, 2, 2)
    engine(rows(0, 0, 2).bfloat16()).backward()   # gradients that nobody wants any more
    assert engine.load_checkpoint(tmp_path) == (None, None)
    engine.load_checkpoint(tmp_path, tag="best")
    assert_same(state(engine), want)
    assert train(engine, 2, 2) == losses
    engine.destroy()


@on_ranks(2)
def test_parts_of_a_checkpoint(tmp_path):
    engine = start(config(1))
    train(engine, 3)
    engine.save_checkpoint(tmp_path, client_state=None)
    want, lr = state(engine), engine.get_lr()
    engine.destroy()

    engine = start(config(3), everything(seed=5))
    engine.load_checkpoint(tmp_path, load_module_only=True)
    got = state(engine)
    assert all(torch.equal(got[key], want[key]) for key in got)
    assert engine.global_steps == 0 and engine.lr_scheduler.last_batch_iteration != 2 and not any(k[1] == "exp_avg" for k in got)
    engine.load_checkpoint(tmp_path, load_optimizer_states=False, load_lr_scheduler_states=False)
    assert engine.global_steps == 3 and engine.optimizer.stepper.steps == 0 and engine.get_lr() != lr
    engine.load_checkpoint(tmp_path, load_optimizer_states=False)
    assert engine.get_lr() == lr
    engine.destroy()


class Fussy(torch.nn.Linear):
    """Its extra state is taken over by one rank only."""

    def get_extra_state(self):
        return {"a": 1}

    def set_extra_state(self, state):
        if dist.get_rank() == 1:
            raise KeyError("b")


@on_ranks(2)
def test_a_module_that_raises_on_one_rank_fails_the_load_on_all(tmp_path):
    model = everything()
    model.inner.__class__ = Fussy
    engine = start(config(1), model)
    engine.save_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="failed on rank 1: KeyError: 'b'"):
        engine.load_checkpoint(tmp_path)
    engine.destroy()


@on_ranks(2)
def test_what_cannot_continue_is_refused_before_anything_changes(tmp_path):
    cfg = config(2)
    cfg.pop("scheduler")
    engine = start(cfg, lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 3))
    train(engine, 1)
    engine.save_checkpoint(tmp_path)
    want = state(engine)
    engine.destroy()
    engine = start(config(2), everything(seed=5))
    before = state(engine)
    with pytest.raises(CheckpointError, match="schedule.*last_epoch.*WarmupLR.*load_lr_scheduler_states=False"):
        engine.load_checkpoint(tmp_path)
    random_of = Checkpoint.random_of
    try:
        if dist.get_rank() == 1:
            Checkpoint.random_of = _unreadable
        with pytest.raises(CheckpointError, match="failed on rank 1: .*random"):
            engine.load_checkpoint(tmp_path, load_lr_scheduler_states=False)
    finally:
        Checkpoint.random_of = random_of
    assert_same(state(engine), before)
    engine.load_checkpoint(tmp_path, load_lr_scheduler_states=False)
    assert_same(state(engine), want)
    engine.destroy()


def _unreadable(checkpoint, rank):
    raise CheckpointError("random generators of another kind")


class Grown(type(everything())):
    def __init__(self):
        super().__init__()
        del self.inner
        self.inner = torch.nn.Linear(7, 11, bias=False)
        self.extra = torch.nn.Linear(11, 2)
        self.still = torch.nn.Linear(11, 7, bias=False)


@on_ranks(2)
def test_parameters_come_and_go(tmp_path):
    engine = start(config(2))
    train(engine, 2)
    engine.save_checkpoint(tmp_path)
    want = state(engine)
    engine.destroy()
    engine = start(config(3), Grown())
    before = state(engine)
    with pytest.raises(CheckpointError) as error:
        engine.load_checkpoint(tmp_path)
    for name in ("'extra.weight' is not in the checkpoint", "'inner.bias' is in the checkpoint, but not in the model", "extra.bias"):
        assert name in str(error.value)
    assert_same(state(engine), before)   # nothing has changed
    engine.load_checkpoint(tmp_path, load_module_strict=False)
    got = state(engine)
    assert torch.equal(got["inner.weight", "exp_avg"], want["inner.weight", "exp_avg"])
    assert torch.equal(got["still.weight", "fp32"], want["still.weight", "weight"]) and not got["still.weight", "exp_avg"].any()
    assert torch.equal(got["extra.weight", "fp32"], before["extra.weight", "fp32"])
    index = engine.module.extra.weight.ds_home.index
    assert engine.optimizer.stepper.missed_steps.get(index, 2) == 2
    train(engine, 1, 2)
    engine.destroy()


def shift(src, dst):
    """A loader of the caller's: it renames nothing, and adds 1 to one parameter."""
    dst.load_state_dict(src)
    dst.scale.data.add_(1.0)


@on_ranks(2)
def test_a_function_of_the_callers_loads(tmp_path):
    for stage in (1, 3):
        engine = start(config(stage, "bf16"))
        train(engine, 2)
        engine.save_checkpoint(tmp_path / str(stage))
        want = state(engine)
        engine.destroy()
        engine = start(config(stage, "bf16"), everything(seed=5))
        engine.load_checkpoint(tmp_path / str(stage), custom_load_fn=shift)
        got = state(engine)
        for key, value in want.items():
            if key == ("scale", "fp32"):
                assert got[key].item() == (value.bfloat16() + 1).item()
            else:
                assert torch.equal(got[key], value), (stage, key)
        engine.destroy()


@on_ranks(2)
def test_frozen_parameters_are_written_once_or_left_out(tmp_path):
    engine = start(config(2))
    for tag in ("a", "b"):
        train(engine, 1)
        engine.save_checkpoint(tmp_path, tag=tag)
    rank = dist.get_rank()
    name = f"frozen_{rank:05d}_of_00002.safetensors"
    if (tmp_path / "a" / name).exists():
        assert os.path.samefile(tmp_path / "a" / name, tmp_path / "b" / name)
    engine.module.still.weight.data.add_(1.0)
    engine.save_checkpoint(tmp_path, tag="c")
    if (tmp_path / "c" / name).exists() and Checkpoint(tmp_path / "c").tensors["still.weight", "weight"].pieces[0][0] == name:
        assert not os.path.samefile(tmp_path / "a" / name, tmp_path / "c" / name)
    engine.save_checkpoint(tmp_path, tag="d", exclude_frozen_parameters=True)
    want = state(engine)
    engine.destroy()
    engine = start(config(3), everything(seed=5))
    with pytest.raises(CheckpointError, match="saved with exclude_frozen_parameters"):
        engine.load_checkpoint(tmp_path, tag="d")
    engine.load_checkpoint(tmp_path, tag="c")
    engine.load_checkpoint(tmp_path, tag="d", load_module_strict=False)
    assert_same(state(engine), want)
    engine.destroy()


@on_ranks(2)
def test_models_of_zero_init_and_without_an_optimizer(tmp_path):
    import deepspeed
    cfg = config(3)
    engine = start(cfg)
    train(engine, 2)
    engine.save_checkpoint(tmp_path)
    want = state(engine)
    engine.destroy()
    with deepspeed.zero.Init(config_dict_or_path=cfg):
        model = everything(seed=5)
    engine = start(cfg, model)
    engine.load_checkpoint(tmp_path)
    assert_same(state(engine), want)
    engine.destroy()
    for stage in (0, 3):
        cfg = config(stage)
        for key in ("optimizer", "scheduler"):
            cfg.pop(key)
        engine = start(cfg, everything(seed=5))
        engine.load_checkpoint(tmp_path)
        got = state(engine)
        for (name, kind), value in got.items():
            assert torch.equal(value, want[name, "fp32"] if (name, "fp32") in want else want[name, kind]), (stage, name)
        engine.save_checkpoint(tmp_path / f"weights{stage}")
        engine.destroy()
    engine = start(config(2), everything(seed=6))
    engine.load_checkpoint(tmp_path / "weights3")
    assert all(torch.equal(value, want[key]) for key, value in state(engine).items())
    engine.destroy()


@on_ranks(2)
def test_tags(tmp_path):
    engine = start(config(1, checkpoint={"tag_validation": "Fail"}))
    train(engine, 1)
    with pytest.raises(AssertionError, match="different tags"):
        engine.save_checkpoint(tmp_path, tag=f"rank{dist.get_rank()}")
    engine.save_checkpoint(tmp_path, tag="some/where")
    assert (tmp_path / "latest").read_text() == "some/where"
    assert engine.load_checkpoint(tmp_path)[0] == str(tmp_path / "some" / "where")
    with pytest.raises(CheckpointError, match="is no checkpoint"):
        engine.load_checkpoint(tmp_path, tag="other")
    for bad in ("../out", "/out", "."):
        with pytest.raises(ValueError, match="does not name a folder inside"):
            engine.save_checkpoint(tmp_path, tag=bad)
    assert engine.load_checkpoint(tmp_path / "nowhere") == (None, None)
    assert json.loads((tmp_path / "some" / "where" / "manifest.json").read_text())["world_size"] == 2
    engine.destroy()


# ---- in the background


@on_ranks(2)
def test_a_save_in_the_background_holds_the_values_of_the_call(tmp_path):
    for stage in (0, 3):
        folder = tmp_path / str(stage)
        cfg = config(stage, "bf16", checkpoint={"writer": {"decoupled": True}, "keep_last": 2})
        engine = start(cfg)
        train(engine, 2)
        want, written, may_write = [state(engine)], save.stream, threading.Event()
        save.stream = lambda *args: may_write.wait(60) and written(*args)
        try:
            engine.save_checkpoint(folder, tag="first", save_latest=False)
            train(engine, 2, 2)             # changes the values before they are written
            want.append(state(engine))
            assert not engine._background_saver.current.done
        finally:
            may_write.set()
            engine._finish_save()
            save.stream = written
        engine.save_checkpoint(folder)
        train(engine, 1, 4)
        engine.save_checkpoint(folder)
        engine.destroy()                    # waits too
        assert sorted(p.name for p in folder.iterdir() if p.is_dir()) == ["first", "global_step4", "global_step5"]
        engine = start(cfg, everything(seed=5))
        engine.load_checkpoint(folder)
        assert engine.global_steps == 5
        engine.save_checkpoint(folder, tag="kept", save_latest=False)
        engine.load_checkpoint(folder, tag="global_step4")   # waits for what is under way
        assert (folder / "kept").is_dir()
        engine.destroy()
        engine = start(config(stage, "bf16", checkpoint={"writer": {"decoupled": True}}), everything(seed=5))
        for tag, steps, values in zip(("first", "global_step4"), (2, 4), want):
            engine.load_checkpoint(folder, tag=tag)
            assert engine.global_steps == steps
            assert_same(state(engine), values)
        engine.destroy()


@on_ranks(2)
def test_what_fails_in_the_background_is_raised_by_a_later_step_on_every_rank(tmp_path):
    cfg = config(1, checkpoint={"writer": {"decoupled": True}})
    engine = start(cfg)
    train(engine, 1)
    engine.save_checkpoint(tmp_path, tag="good")
    engine._finish_save()
    if dist.get_rank() == 1:   # this rank cannot write
        broken, save.stream = save.stream, _no_space
    engine.save_checkpoint(tmp_path, tag="bad")
    with pytest.raises(CheckpointError, match="failed on rank 1: .*No space"):
        for step in range(1, 2000):
            train(engine, 1, step)
    if dist.get_rank() == 1:
        save.stream = broken
    assert sorted(p.name for p in tmp_path.iterdir()) == ["good", "latest", "zero_to_fp32.py", "zero_to_torch.py"]
    train(engine, 1)
    engine.save_checkpoint(tmp_path, tag="after")
    engine.destroy()
    assert (tmp_path / "latest").read_text() == "after"


def _no_space(path, pieces, leave):
    raise OSError(28, "No space left on device", path)
