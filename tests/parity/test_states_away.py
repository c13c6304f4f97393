# SPDX-License-Identifier: Apache-2.0
"""While states are away nobody reads zeros in their place or writes what the reload would take back, and an error on one rank is everyone's."""
import errno
import gc

import pytest
import torch
import torch.distributed as dist

import deepspeed
from deepspeed.checkpoint.pretrained import load_pretrained_shards
from deepspeed.checkpoint.source import CheckpointError
from deepspeed.runtime.zero.offload_config import OffloadStateTypeEnum
from deepspeed.utils import (safe_get_full_fp32_param, safe_get_full_grad, safe_get_full_optimizer_state, safe_get_local_fp32_param,
                             safe_get_local_grad, safe_get_local_optimizer_state, safe_set_full_fp32_param, safe_set_full_grad,
                             safe_set_full_optimizer_state, safe_set_local_fp32_param, safe_set_local_grad, safe_set_local_optimizer_state)
from deepspeed.zero import resting
from tests.parity.launch import on_ranks
from tests.parity.tiny import assert_same, batch, config, engine_of, tiny, train, whole

KINDS = {kind.value for kind in OffloadStateTypeEnum}
WEIGHTS, MASTERS, GRADS, MOMENTS = {"lp_params"}, {"lp_params", "hp_params"}, {"lp_grads"}, {"optim_states"}
BACKWARD = {"lp_params", "lp_grads", "contiguous_grad_buffer"}
MEMBER = "layers.1.linear.weight"


def engine_in_mid_accumulation(stage, bf16, folder):
    zero = {"offload_optimizer": {"device": "none", "nvme_path": str(folder)}, "stage3_gather_16bit_weights_on_model_save": True}
    settings = {"bf16": {"enabled": True}} if bf16 else {}
    engine = engine_of(tiny(), config(stage, zero=zero, gradient_accumulation_steps=2, **settings))
    train(engine, 3)
    return engine


def member(engine):
    return dict(engine.module.named_parameters())[MEMBER]


def x_of(engine):
    return batch(7).to(engine.get_data_types()[0])


def file_of(engine, folder):
    engine.save_16bit_model(folder)
    dist.barrier()
    state = torch.load(folder / "pytorch_model.bin")
    dist.barrier()
    return state


def states_of(engine):
    return {f"{name}/{key}": value for name, entry in engine.optimizer.state_dict()["state"].items()
            for key, value in entry.items() if torch.is_tensor(value)}


def readers(engine, folder):
    """{what is read: (call, kinds of states it lies in)}"""
    p = member(engine)
    return {
        "save_16bit_model": (lambda: file_of(engine, folder), WEIGHTS),
        "module.state_dict": (engine.module.state_dict, WEIGHTS),
        "a part's state_dict": (lambda: engine.module.layers[1].state_dict(), WEIGHTS),
        "module_state_dict": (engine.module_state_dict, WEIGHTS),
        "engine.state_dict": (engine.state_dict, WEIGHTS),
        "gathered": (lambda: whole(engine.module), WEIGHTS if engine.zero_optimization_stage() == 3 else set()),
        "streamed": (lambda: {n: t.clone() for n, t in engine.iter_full_params()}, WEIGHTS),
        "optimizer.state_dict": (lambda: states_of(engine), MASTERS | MOMENTS),
        "fp32": (lambda: safe_get_full_fp32_param(p), MASTERS), "local fp32": (lambda: safe_get_local_fp32_param(p), MASTERS),
        "grad": (lambda: safe_get_full_grad(p), GRADS), "local grad": (lambda: safe_get_local_grad(p), GRADS),
        "state": (lambda: safe_get_full_optimizer_state(p, "exp_avg"), MOMENTS),
        "local state": (lambda: safe_get_local_optimizer_state(p, "exp_avg"), MOMENTS),
    }


def outcome(call):
    """What a reader gives, as {name: copy}; the text of the error where the stage refuses it anyway."""
    try:
        value = call()
        return {name: t.detach().clone() for name, t in (value if isinstance(value, dict) else {"": value}).items()}
    except RuntimeError as error:
        return str(error)


def writers(engine, folder):
    p, optimizer = member(engine), engine.optimizer
    ones = torch.ones(p.ds_shape if hasattr(p, "ds_shape") else p.shape)
    mine = torch.ones(safe_get_local_fp32_param(p).numel())
    weights = torch.load(folder / "pytorch_model.bin")
    saved = optimizer.state_dict()
    return {
        "load_module_state_dict": (lambda: engine.load_module_state_dict(weights), MASTERS),
        "load_pretrained_shards": (lambda: load_pretrained_shards(engine, folder), MASTERS),
        "load_state_dict": (lambda: engine.module.load_state_dict(weights), WEIGHTS),
        "a part's load_state_dict": (lambda: engine.module.head.load_state_dict({}, strict=False), WEIGHTS),
        "load_checkpoint": (lambda: engine.load_checkpoint(folder), KINDS), "save_checkpoint": (lambda: engine.save_checkpoint(folder), KINDS),
        "fp32": (lambda: safe_set_full_fp32_param(p, ones), MASTERS), "local fp32": (lambda: safe_set_local_fp32_param(p, mine), MASTERS),
        "grad": (lambda: safe_set_full_grad(p, ones), GRADS), "local grad": (lambda: safe_set_local_grad(p, mine), GRADS),
        "state": (lambda: safe_set_full_optimizer_state(p, ones, "exp_avg"), MOMENTS),
        "local state": (lambda: safe_set_local_optimizer_state(p, mine, "exp_avg"), MOMENTS),
        "optimizer.load_state_dict": (lambda: optimizer.load_state_dict(saved), MASTERS | MOMENTS),
        "step": (engine.step, KINDS), "optimizer.step": (optimizer.step, KINDS),
        "zero_grad": (engine.zero_grad, GRADS), "optimizer.zero_grad": (optimizer.zero_grad, GRADS),
        "forward": (lambda: engine(x_of(engine)), WEIGHTS), "module's forward": (lambda: engine.module(x_of(engine)), WEIGHTS),
        "backward": (lambda: engine.backward(engine(x_of(engine))), BACKWARD),
        "plain backward": (lambda: engine(x_of(engine)).backward(), BACKWARD),
        "optimizer.backward": (lambda: optimizer.backward(engine(x_of(engine))), BACKWARD),
        "scale": (lambda: engine.scale(engine(x_of(engine))), BACKWARD),
        "again": (lambda: engine.offload_states(device="nvme"), KINDS),
    }


CASES = [*((3, True, include) for include in (None, *([kind] for kind in sorted(KINDS)), ["hp_params", "optim_states"], ["lp_params", "lp_grads"])),
         *((stage, bf16, include) for stage, bf16 in ((0, True), (2, False)) for include in (None, ["lp_params"], ["lp_grads"]))]


@on_ranks(2)
@pytest.mark.parametrize("stage, bf16, include", CASES)
def test_nobody_meets_what_is_away(stage, bf16, include, tmp_path):
    wanted = None
    for away in (False, True):
        engine = engine_in_mid_accumulation(stage, bf16, tmp_path)
        if away:
            gone = KINDS if include is None else set(include)
            reading = readers(engine, tmp_path)
            before = {name: outcome(call) for name, (call, _) in reading.items()}
            assert all(value.abs().sum() > 0 for name in ("fp32", "grad", "state") for value in before[name].values())
            writing = writers(engine, tmp_path)
            engine.offload_states(include=include, device="nvme")
            for name, (call, kinds) in (*reading.items(), *writing.items()):
                if kinds & gone:
                    with pytest.raises(RuntimeError, match="away since .*reload_states"):
                        call()
                elif name in reading and reading[name][0] is call:
                    check_same(outcome(call), before[name], name)
            engine.reload_states()
            for name, (call, _) in reading.items():
                check_same(outcome(call), before[name], name)
        losses = train(engine, 3, first=3)   # the second half of the accumulation, and one more update
        found = {**whole(engine.module), **states_of(engine), "losses": torch.tensor(losses)}
        found = {name: value.clone() for name, value in found.items()}
        if away:
            assert_same({n: v for n, v in found.items() if n != "seen"}, wanted)
        wanted = found


def check_same(found, wanted, name):
    assert isinstance(found, str) == isinstance(wanted, str), (name, found, wanted)
    if isinstance(found, str):
        assert "away" not in found, (name, found)   # how many are gathered, which the text tells, forwards without a backward change
    else:
        counters = [key for key in found if key.endswith("seen")]   # the buffer that every forward changes
        assert_same({k: v for k, v in found.items() if k not in counters}, {k: v for k, v in wanted.items() if k not in counters})


@on_ranks(2)
@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize("dropped", [False, True])
def test_a_model_outlives_its_engine_with_its_values(stage, dropped, tmp_path):
    engine = engine_in_mid_accumulation(stage, True, tmp_path)
    model, wanted = engine.module, whole(engine.module)
    engine.offload_states(device="nvme")
    if not dropped:
        engine.destroy()
    del engine
    gc.collect()
    dist.barrier()
    assert_same(whole(model), wanted)
    assert stage == 3 or model.state_dict()
    dist.barrier()


# ---------------------------------------------------------------------------------------------------------------- one rank's errors

def failing(patch, name):
    """This method of FileCopies fails on rank 1, once it has done half of its work."""
    original = getattr(resting.FileCopies, name)

    def method(self, *args):
        original(self, *args)
        raise OSError(errno.EIO, "the disk is gone")

    if dist.get_rank() == 1:
        patch.setattr(resting.FileCopies, name, method)


@on_ranks(2)
@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("where", ["__init__", "keep", "give_back"])
def test_an_error_on_one_rank_is_raised_on_all_and_loses_nothing(stage, where, tmp_path):
    engine = engine_in_mid_accumulation(stage, True, tmp_path)
    weights, states = whole(engine.module), {name: value.clone() for name, value in states_of(engine).items()}
    what = "reload_states" if where == "give_back" else "offload_states"
    with pytest.MonkeyPatch.context() as patch:
        failing(patch, where)
        if where == "give_back":
            engine.offload_states(device="nvme")
        with pytest.raises(CheckpointError, match=f"{what} failed on rank 1: .*the disk is gone"):
            getattr(engine, what)(**({} if where == "give_back" else {"device": "nvme"}))
        if where == "give_back":
            with pytest.raises(RuntimeError, match="away since"):
                engine.step()
    if where == "give_back":
        engine.reload_states()
    assert_same(whole(engine.module), weights)
    assert_same(states_of(engine), states)
    engine.offload_states(device="nvme")
    engine.reload_states()
    train(engine, 2, first=3)


@on_ranks(2)
def test_a_folder_that_one_rank_cannot_make(tmp_path):
    engine = engine_in_mid_accumulation(3, False, tmp_path)
    (tmp_path / "file").touch()
    if dist.get_rank() == 1:
        engine._folder_for_states = lambda: str(tmp_path / "file" / "below")
    with pytest.raises(CheckpointError, match="failed on rank 1: NotADirectoryError"):
        engine.offload_states(device="nvme")
    train(engine, 2, first=3)


# ---------------------------------------------------------------------------------------------------------------- accelerators

def test_memory_that_cannot_be_resized_stays(monkeypatch):
    """The way of an accelerator, with host memory: what numpy holds is not torch's, and a part is not the whole of its storage."""
    monkeypatch.setattr(resting, "_on_host", lambda tensor: False)
    import numpy
    own, foreign, part, spare = torch.arange(6.), torch.from_numpy(numpy.arange(5.)), torch.arange(9.)[2:4], torch.ones(3)
    tensors = [("optim_states", own), ("lp_params", foreign), ("hp_params", part)]
    wanted = [tensor.clone() for _, tensor in tensors]
    states = resting.RestingStates(tensors, [("lp_grads", spare), ("lp_grads", torch.from_numpy(numpy.ones(3)))])
    assert states.staying == ["hp_params", "lp_grads", "lp_params"]
    states.keep(resting.HostCopies(pin_memory=False, non_blocking=False))
    states.free()
    assert own.untyped_storage().nbytes() == spare.untyped_storage().nbytes() == 0
    assert torch.equal(foreign, wanted[1]) and torch.equal(part, wanted[2])
    states.bring_back(False)
    assert own.untyped_storage().nbytes() == 24 and spare.untyped_storage().nbytes() == 12
    assert all(torch.equal(tensor, value) for (_, tensor), value in zip(tensors, wanted))
