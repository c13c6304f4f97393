# SPDX-License-Identifier: Apache-2.0
"""Stages 0-3 give one and the same training: bit for bit among each other, within rounding of one process with plain torch."""
import pytest
import torch

from tests.parity.cases import CASES
from tests.parity.launch import on_ranks, run
from tests.parity.reference_loop import Tolerance, close, reference_loop
from tests.parity.training import STAGES, assert_same_bits, engine_loop, config, full_parameters, start, train, transport

_TORCH = {"bf16": torch.bfloat16, "fp16": torch.float16}


def stages_agree(name, steps, accumulation, options):
    first = train(CASES[name], 0, steps, accumulation, **options)
    for stage in STAGES[1:]:
        assert_same_bits(train(CASES[name], stage, steps, accumulation, **options), first, f"stage {stage} of {name}")
    return first


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("name", CASES)
def test_fp32_stages_are_bit_equal_and_follow_plain_torch(name, accumulation):
    steps = 50 if name == "gpt" else 10
    got = run(stages_agree, 2, name, steps, accumulation, {})[0]
    close(got, reference_loop(CASES[name], 2, steps, accumulation))


@pytest.mark.parametrize("name", ["tied", "odd", "zero_dim", "unused", "routed"])
def test_on_three_ranks(name):
    got = run(stages_agree, 3, name, 5, 2, {})[0]
    close(got, reference_loop(CASES[name], 3, 5, 2))


class Rounded:
    """Builds a case's model in float32 with values that `dtype` can represent, so that plain torch, which keeps no master of the
    original values, and the engine start from the same point."""

    def __init__(self, model, dtype):
        self.model, self.dtype = model, dtype

    def __call__(self):
        model = self.model()
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(p.to(self.dtype))
        return model


def rounded_case(name, precision):
    return CASES[name]._replace(model=Rounded(CASES[name].model, _TORCH[precision]))


def low_precision_agrees(precision):
    found = {}
    for name in CASES:
        case = rounded_case(name, precision)
        found[name] = train(case, 0, 5, 2, precision)
        for stage in STAGES[1:]:
            assert_same_bits(train(case, stage, 5, 2, precision), found[name], f"stage {stage} of {name}")
    return found


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_is_within_twice_the_error_of_plain_torch(precision):
    options = dict(loss_scale=1024.0) if precision == "fp16" else {}
    for name, got in run(low_precision_agrees, 2, precision)[0].items():
        bounds = Tolerance.measure(rounded_case(name, precision), 2, 5, 2, dtype=_TORCH[precision], **options)
        bounds.check(got.losses, got.parameters)


@on_ranks(2)
def test_masters_keep_the_values_that_low_precision_rounds():
    for precision in ("bf16", "fp16"):
        for stage in STAGES:
            before = {name: p.detach().clone() for name, p in CASES["odd"].build().named_parameters()}
            engine = start(CASES["odd"].build(), config(stage, precision=precision))
            after = full_parameters(engine.module)
            assert all(torch.equal(after[name], value) for name, value in before.items())
            assert all(p.dtype == _TORCH[precision] for p in engine.module.parameters())
            engine.destroy()


def carriers_agree(name, steps, options):
    for stage in STAGES:
        with transport("shm"):
            shm = train(CASES[name], stage, steps, 2, **options)
        with transport("c10d"):
            gloo = train(CASES[name], stage, steps, 2, **options)
        assert_same_bits(gloo, shm, f"stage {stage} of {name} over Gloo")


@pytest.mark.parametrize("ranks", [2, 3])
def test_shared_memory_and_gloo_give_the_same_bits(ranks):
    for name in ("tied", "unused", "routed", "mixed_dtype"):
        run(carriers_agree, ranks, name, 3, {})
    run(carriers_agree, ranks, "zero_dim", 3, {"precision": "bf16"})


def clipped(stage):
    return train(CASES["gpt"], stage, 5, 2, gradient_clipping=0.1, lr_at=halving)


def halving(step):
    return 1e-2 / 2**step


def clipping_and_schedule():
    first = clipped(0)
    for stage in STAGES[1:]:
        assert_same_bits(clipped(stage), first, f"stage {stage}")
    return first


def test_exact_global_norm_clipping_and_learning_rate_by_the_shared_groups():
    got = run(clipping_and_schedule, 2)[0]
    want = reference_loop(CASES["gpt"], 2, 5, 2, clip=0.1, lr_at=halving)
    close(got, want)
    assert min(want.norms) > 0.1  # clipping had something to do
    torch.testing.assert_close(torch.tensor(got.norms), torch.tensor(want.norms), rtol=1e-5, atol=0)


@on_ranks(2)
def test_the_engine_shows_the_very_group_dicts():
    for stage in STAGES:
        model = CASES["odd"].build()
        client = torch.optim.AdamW([{"params": [model.first.weight], "lr": 0.0}, {"params": [model.second.weight, model.second.bias]}], lr=1e-2)
        groups = list(client.param_groups)
        before = model.first.weight.detach().clone()
        engine = start(model, config(stage, optimizer=None), optimizer=client)
        assert all(a is b for a, b in zip(engine.optimizer.param_groups, groups))
        engine_loop(engine, CASES["odd"], 2)
        after = full_parameters(model)
        assert torch.equal(after["first.weight"], before)
        scheduler = torch.optim.lr_scheduler.LambdaLR(client, lambda step: 0.0)
        scheduler.step()
        engine_loop(engine, CASES["odd"], 1)
        assert torch.equal(full_parameters(model)["second.weight"], after["second.weight"]), stage
        engine.destroy()
