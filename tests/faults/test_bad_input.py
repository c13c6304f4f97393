# SPDX-License-Identifier: Apache-2.0
"""Wrong input to the engine: one clear error on every rank, no hang, no crash."""
import os
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist
from torch import nn

import deepspeed
from deepspeed.config import DeepSpeedConfigError
from tests.faults.job import ROOT, Job
from tests.parity.launch import on_ranks
from tests.parity.tiny import assert_same, batch, config, engine_of, tiny, train, whole

STAGES = [0, 1, 2, 3]


# ------------------------------------------------------------------------------------------------------------------------- loss


@on_ranks(2)
@pytest.mark.parametrize("stage", [0, 3])
def test_a_loss_that_is_no_scalar(stage):
    engine = engine_of(tiny(), config(stage))
    with pytest.raises(AssertionError, match=r"scalar.*\(2, 1\)"):
        engine.backward(engine.module.body(batch(0)))
    with pytest.raises(AssertionError, match="must be a tensor, got dict"):
        engine.backward({"loss": engine(batch(0))})
    with pytest.raises(AssertionError, match="must be a tensor, got float"):
        engine.backward(engine(batch(0)).item())
    with torch.no_grad():
        loss = engine(batch(0))
    with pytest.raises(AssertionError, match="does not require a gradient"):
        engine.backward(loss)
    assert train(engine, 2) == train(engine_of(tiny(), config(stage)), 2)


@on_ranks(2)
@pytest.mark.parametrize("stage", STAGES)
def test_nan_in_fp32(stage):
    """On one rank only: all ranks raise, name the same parameter and rank, and keep their weights."""
    engine = engine_of(tiny(), config(stage))
    before = whole(engine.module)
    loss = engine(batch(0))
    engine.backward(loss * float("nan") if dist.get_rank() == 1 else loss)
    with pytest.raises(FloatingPointError, match=r"not finite in parameter '.*' on rank 1 at step 0"):
        engine.step()
    assert_same(whole(engine.module), before)
    assert train(engine, 2)[0] == loss.item()  # the next step is not spoiled


@on_ranks(2)
@pytest.mark.parametrize("stage", STAGES)
def test_nan_in_bf16_is_skipped(stage):
    engine = engine_of(tiny(), config(stage, bf16={"enabled": True}))
    before = whole(engine.module)
    loss = engine(batch(0).bfloat16())
    engine.backward(loss * float("nan") if dist.get_rank() == 1 else loss)
    engine.step()
    assert engine.skipped_steps == 1 and engine.global_steps == 1 and not engine.was_step_applied() and engine.optimizer.overflow
    assert_same(whole(engine.module), before)
    train(engine, 1)
    assert engine.was_step_applied()


# ------------------------------------------------------------------------------------------------------------------- parameters


class Squares(nn.Module):
    """Works with a weight of any number of rows."""

    def __init__(self):
        super().__init__()
        self.inner, self.weight = nn.Linear(9, 9), nn.Parameter(torch.ones(3, 9))

    def forward(self, x):
        return (self.inner(x) @ self.weight.t()).square().mean()


@on_ranks(2)
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_parameter_that_changed_shape(stage):
    engine = engine_of(Squares(), config(stage))
    train(engine, 1)
    engine.module.weight.data = torch.ones(50, 9)
    with pytest.raises(RuntimeError, match=r"'weight'.*\[50, 9\].*\[3, 9\]"):
        train(engine, 1)


@on_ranks(2)
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_data_of_the_same_shape_counts(stage):
    engine, other = engine_of(tiny(), config(stage)), engine_of(tiny(), config(stage))
    with torch.no_grad():
        other.module.head.weight.fill_(2.0)
        deepspeed.utils.safe_set_full_fp32_param(other.module.head.weight, torch.full((1, 9), 2.0))
    engine.module.head.weight.data = torch.full((1, 9), 2.0)
    assert train(engine, 3) == train(other, 3)
    assert_same(whole(engine.module), whole(other.module))


@on_ranks(2)
@pytest.mark.parametrize("stage", [0, 3])
def test_an_optimizer_with_foreign_parameters(stage):
    model, other = tiny(), nn.Linear(4, 7)
    optimizer = torch.optim.AdamW([{"params": model.parameters()}, {"params": other.parameters()}])
    with pytest.raises(ValueError, match=r"param_groups\[1\]\['params'\]\[0\], of shape \(7, 4\).*not a parameter of the model"):
        engine_of(model, config(stage, optimizer=None), optimizer=optimizer)
    train(engine_of(model, config(stage)), 1)  # nothing has been done to the model


@on_ranks(2)
def test_things_that_are_no_optimizer():
    with pytest.raises(TypeError, match="int"):
        engine_of(tiny(), config(1), optimizer=3)
    frozen = tiny().requires_grad_(False)
    with pytest.raises(ValueError):
        engine_of(frozen, config(1))
    with pytest.raises(DeepSpeedConfigError, match="optimizer.params.*nonsense"):
        engine_of(tiny(), config(1, optimizer={"type": "AdamW", "params": {"nonsense": 1}}))
    with pytest.raises((DeepSpeedConfigError, ValueError), match="NoSuch"):
        engine_of(tiny(), config(1, optimizer={"type": "NoSuch"}))


@on_ranks(2)
def test_a_param_group_that_comes_too_late():
    engine = engine_of(tiny(), config(2))
    for optimizer in (engine.optimizer, engine.basic_optimizer):
        with pytest.raises(RuntimeError, match="would never be updated: put all groups into the optimizer before"):
            optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})
    train(engine, 1)


@on_ranks(2)
def test_float64_is_not_trained():
    model = tiny()
    model.head.double()
    with pytest.raises(ValueError, match=r"^parameter 'head.weight' is to be trained and is torch.float64; .*module.float\(\).*freeze it"):
        engine_of(model, config(1))


@on_ranks(2)
def test_a_model_without_values():
    with torch.device("meta"):
        model = nn.Linear(3, 3)
    with pytest.raises(RuntimeError, match="'weight' is on the meta device"):
        engine_of(model, config(3))
    with pytest.raises(AssertionError, match="model is None"):
        deepspeed.initialize(model=None, config=config(1))


# ---------------------------------------------------------------------------------------------------- configuration, environment


@on_ranks(2)
def test_a_batch_that_the_ranks_do_not_divide():
    with pytest.raises((DeepSpeedConfigError, AssertionError), match=r"(?s)train_batch_size.*7.*2"):
        engine_of(tiny(), config(1, train_batch_size=7, train_micro_batch_size_per_gpu=None))
    with pytest.raises((DeepSpeedConfigError, AssertionError), match=r"(?s)12.*2.*2"):
        engine_of(tiny(), config(1, train_batch_size=12, gradient_accumulation_steps=2))


@on_ranks(2)
def test_configurations_given_twice_or_not_at_all(tmp_path=None):
    import argparse
    args = argparse.Namespace(deepspeed_config="some.json", local_rank=-1)
    with pytest.raises(AssertionError, match="given twice.*some.json"):
        deepspeed.initialize(args=args, model=tiny(), config=config(1))
    with pytest.raises(AssertionError, match="config_params"):
        deepspeed.initialize(model=tiny(), config=config(1), config_params=config(1))
    with pytest.raises(AssertionError, match="no configuration"):
        deepspeed.initialize(model=tiny())
    assert deepspeed.initialize(model=tiny(), config_params=config(1))[0].zero_optimization_stage() == 1


@on_ranks(2)
def test_local_rank():
    import argparse
    args = argparse.Namespace(local_rank=5)
    with pytest.raises(AssertionError, match="args.local_rank is 5 but LOCAL_RANK in the environment is"):
        deepspeed.initialize(args=args, model=tiny(), config=config(1))
    args.local_rank = -1
    deepspeed.initialize(args=args, model=tiny(), config=config(1))
    assert args.local_rank == dist.get_rank()
    kept = os.environ.pop("LOCAL_RANK")
    try:
        with pytest.raises(AssertionError, match="LOCAL_RANK is not set.*launcher"):
            deepspeed.initialize(model=tiny(), config=config(1))
    finally:
        os.environ["LOCAL_RANK"] = kept


def test_cuda_without_a_gpu():
    """In a process of its own: the accelerator is chosen once."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    env = dict(os.environ, DS_ACCELERATOR="cuda", PYTHONPATH=str(ROOT), RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1",
               MASTER_PORT="0")
    code = "import torch, deepspeed; deepspeed.initialize(model=torch.nn.Linear(2, 2), config={'train_batch_size': 1})"
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1 and result.stderr.count("Traceback") == 1
    last = result.stderr.strip().splitlines()[-1]
    assert "GPU" in last and "DS_ACCELERATOR" in last


# ------------------------------------------------------------------------------------------------------ one rank ends, all end


FAILING = """
import torch, torch.distributed as dist
import deepspeed
torch.manual_seed(0)
model = torch.nn.Sequential(*[torch.nn.Linear(64, 64) for _ in range(4)])
engine = deepspeed.initialize(model=model, config={"train_batch_size": 2, "optimizer": {"type": "Adam", "params": {"lr": 1e-3}},
    "zero_optimization": {"stage": STAGE, "stage3_prefetch_bucket_size": 5000, "stage3_param_persistence_threshold": 0}})[0]
for step in range(1000000):
    loss = engine(torch.randn(1, 64)).square().mean()
    if rank == 1 and step == 3:
        mark("raised")
        raise ValueError("the cause")
    engine.backward(loss)
    engine.step()
"""


def check_one_traceback(err):
    assert err.count("Traceback (most recent call last)") == 1, err
    assert "ValueError: the cause" in err


@pytest.mark.parametrize("stage", [0, 3])
def test_a_rank_that_raises_in_a_step_ends_the_job(tmp_path, stage):
    with Job(tmp_path, FAILING.replace("STAGE", str(stage))) as job:
        while not (tmp_path / "raised").exists():
            assert job.process.poll() is None, job.output()
            time.sleep(0.02)
        begun = time.monotonic()
        code, _, err = job.finish(30)
        assert time.monotonic() - begun < 10 and code == 1 and job.survivors(1) == []
        check_one_traceback(err)


def test_under_torchrun_all_ranks_end_too(tmp_path):
    flags = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    job = Job(tmp_path, FAILING.replace("STAGE", "3"))
    env = dict(os.environ, TEST_DIR=str(tmp_path), PYTHONPATH=str(ROOT), DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1")
    with subprocess.Popen([sys.executable, *flags, str(job.script)], env=env, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE) as process:
        try:
            while not (tmp_path / "raised").exists():
                assert process.poll() is None, process.communicate()
                time.sleep(0.02)
            begun = time.monotonic()
            _, err = process.communicate(timeout=40)
        finally:
            process.kill()
    assert time.monotonic() - begun < 15 and process.returncode == 1 and job.survivors(1) == []
    assert err.count("ValueError: the cause") == 1
