# SPDX-License-Identifier: Apache-2.0
"""fp16 loss scaling, bf16 and fp32 gradients that are not finite."""
import logging
import math

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.parity.cases import CASES
from tests.parity.launch import on_ranks
from tests.parity.training import STAGES, cast_batch, config, full_parameters, start, transport


class Exploding(nn.Module):
    """Its `bad` layer has an infinite gradient on the ranks that are told so."""

    def __init__(self):
        super().__init__()
        self.good, self.bad, self.last = nn.Linear(7, 13), nn.Linear(13, 5), nn.Linear(5, 1)

    def forward(self, x, explode):
        y = self.bad(torch.tanh(self.good(x)))
        if explode:
            y.register_hook(lambda grad: grad * math.inf)
        return self.last(torch.tanh(y)).square().mean()


class Messages(logging.Handler):
    def __init__(self):
        super().__init__()
        self.texts = []

    def emit(self, record):
        self.texts.append(record.getMessage())

    def __enter__(self):
        from deepspeed.telemetry import logger
        logger.addHandler(self)
        return self

    def __exit__(self, *error):
        from deepspeed.telemetry import logger
        logger.removeHandler(self)


def exploding_engine(stage, precision, **section):
    torch.manual_seed(3)
    cfg = config(stage, precision=precision)
    if precision == "fp16":
        cfg["fp16"] = {"enabled": True, **section}
    return start(Exploding(), cfg)


def micro_batch(engine, precision, explode):
    x, = cast_batch((torch.randn(4, 7, generator=torch.Generator().manual_seed(dist.get_rank())),), precision)
    engine.backward(engine(x, explode))
    engine.step()


@on_ranks(2)
def test_an_overflow_skips_the_step_halves_the_scale_and_names_parameter_and_rank():
    for choice in ("shm", "c10d"):
        for stage in STAGES:
            with transport(choice):
                engine = exploding_engine(stage, "fp16", initial_scale_power=8, hysteresis=1, loss_scale_window=2)
            before = full_parameters(engine.module)
            with Messages() as messages:
                micro_batch(engine, "fp16", dist.get_rank() == 1)
            assert engine.optimizer.overflow and engine.skipped_steps == 1 and not engine.was_step_applied()
            assert engine.loss_scale() == 128.0
            assert all(torch.equal(before[n], v) for n, v in full_parameters(engine.module).items())
            text = "\n".join(messages.texts)
            if dist.get_rank() == 0:
                assert "'good.weight' on rank 1" in text or "'bad.weight' on rank 1" in text, text
                assert "256 -> 128" in text
            for _ in range(2):
                micro_batch(engine, "fp16", False)
                assert engine.was_step_applied() and not engine.optimizer.overflow
            assert engine.loss_scale() == 256.0 and engine.skipped_steps == 1 and engine.global_steps == 3
            assert math.isfinite(engine.get_global_grad_norm())
            engine.destroy()


@on_ranks(2)
def test_hysteresis_tolerates_the_first_overflow():
    engine = exploding_engine(3, "fp16", initial_scale_power=8, hysteresis=2)
    micro_batch(engine, "fp16", True)
    assert engine.loss_scale() == 256.0 and engine.skipped_steps == 1
    micro_batch(engine, "fp16", True)
    assert engine.loss_scale() == 128.0 and engine.skipped_steps == 2
    engine.destroy()


@on_ranks(2)
def test_a_static_scale_stays():
    for stage in (0, 3):
        engine = exploding_engine(stage, "fp16", loss_scale=64.0)
        before = full_parameters(engine.module)
        micro_batch(engine, "fp16", dist.get_rank() == 0)
        assert engine.loss_scale() == 64.0 and engine.skipped_steps == 1
        assert all(torch.equal(before[n], v) for n, v in full_parameters(engine.module).items())
        micro_batch(engine, "fp16", False)
        assert engine.loss_scale() == 64.0 and engine.skipped_steps == 1 and engine.was_step_applied()
        assert not torch.equal(before["bad.weight"], full_parameters(engine.module)["bad.weight"])
        engine.destroy()


@on_ranks(2)
def test_overflow_at_the_floor_is_an_error_on_every_rank():
    from deepspeed.precision.loss_scaler import LossScaleFloorError
    for stage in (0, 1, 3):
        engine = exploding_engine(stage, "fp16", initial_scale_power=1, hysteresis=1, min_loss_scale=1)
        micro_batch(engine, "fp16", True)
        assert engine.loss_scale() == 1.0
        with pytest.raises(LossScaleFloorError, match="parameter '(good|bad).weight' on rank 1"):
            micro_batch(engine, "fp16", dist.get_rank() == 1)
        engine.destroy()


@on_ranks(2)
def test_fp32_raises_and_bf16_skips_where_gradients_are_not_finite():
    for stage in STAGES:
        engine = exploding_engine(stage, "fp32")
        with pytest.raises(FloatingPointError, match="parameter '(good|bad).weight' on rank 1"):
            micro_batch(engine, "fp32", dist.get_rank() == 1)
        engine.destroy()
        engine = exploding_engine(stage, "bf16")
        with Messages() as messages:
            micro_batch(engine, "bf16", dist.get_rank() == 1)
        assert engine.skipped_steps == 1 and engine.loss_scale() == 1.0
        assert dist.get_rank() or any("skipped" in text and "on rank 1" in text for text in messages.texts)
        micro_batch(engine, "bf16", False)
        assert engine.was_step_applied()
        engine.destroy()


@on_ranks(2)
def test_bf16_may_step_without_looking():
    cfg = config(1, precision="bf16", zero={"compute_grad_norm": False})
    torch.manual_seed(3)
    engine = start(Exploding(), cfg | {"bf16": {"enabled": True, "check_grad_overflow": False}})
    micro_batch(engine, "bf16", True)
    assert engine.was_step_applied() and engine.skipped_steps == 0 and engine.get_global_grad_norm() is None
    assert not all(value.isfinite().all() for value in full_parameters(engine.module).values())


@on_ranks(2)
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_values_written_into_the_module_reach_the_masters(stage):
    """load_state_dict and other writing in place counts; where nothing changed, the masters keep what bf16 rounds."""
    engine = exploding_engine(stage, "bf16")
    engine.basic_optimizer.param_groups[0].update(lr=1e-6, weight_decay=0.0)
    micro_batch(engine, "bf16", False)
    engine.module.load_state_dict({name: torch.full_like(value, 0.5) for name, value in engine.module.state_dict().items()})
    with torch.no_grad():
        engine.module.last.bias.fill_(7.0)
    micro_batch(engine, "bf16", False)
    now = full_parameters(engine.module)
    for name, value in now.items():
        assert (value - (7.0 if name == "last.bias" else 0.5)).abs().max() < 1e-4, name
    assert (now["bad.weight"] != 0.5).any()   # fp32: bf16 cannot hold so small a step
    engine.basic_optimizer.param_groups[0]["lr"] = 0.0
    with torch.no_grad():
        engine.module.bad.weight.clamp_(-10, 10)
    micro_batch(engine, "bf16", False)
    assert torch.equal(full_parameters(engine.module)["bad.weight"], now["bad.weight"])
    engine.destroy()


@on_ranks(2)
def test_fp16_needs_its_scale_in_a_plain_backward():
    for stage in (1, 3):
        engine = exploding_engine(stage, "fp16", initial_scale_power=8)
        x, = cast_batch((torch.randn(4, 7),), "fp16")
        with pytest.raises(RuntimeError, match="engine.scale"):
            engine(x, False).backward()
        engine.destroy()
        engine = exploding_engine(stage, "fp16", initial_scale_power=8)
        engine.scale(engine(x, False)).backward()
        engine.step()
        assert engine.was_step_applied() and 0 < engine.get_global_grad_norm() < 100
        engine.destroy()


@on_ranks(2)
def test_communication_in_fp32_adds_low_precision_gradients_the_same():
    """Contributions are added in float32 anyway; sending them in float32 changes no bit."""
    from tests.parity.training import assert_same_bits, train
    case = CASES["odd"]
    for stage in (1, 3):
        narrow = train(case, stage, 3, 2, "bf16")
        wide = train(case, stage, 3, 2, "bf16", communication_data_type="fp32")
        if dist.get_world_size() == 2:
            assert_same_bits(wide, narrow)
