# SPDX-License-Identifier: Apache-2.0
"""Engines of every stage and number of ranks continue from checkpoints that DeepSpeed 0.19.8 wrote, without a conversion."""
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import deepspeed
from deepspeed.checkpoint import CheckpointError, open_checkpoint
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from tests.compat.test_deepspeed_checkpoints import CASES, FOLDER, expected_of
from tests.parity.launch import on_ranks

sys.path.append(str(FOLDER))
from model import make_batch, make_groups, make_model  # noqa: E402

PRECISIONS = {"fp32": {}, "bf16": {"bf16": {"enabled": True}}, "fp16": {"fp16": {"enabled": True, "initial_scale_power": 3, "loss_scale_window": 2}}}
# Forwards differ where DeepSpeed rounds once more (its linear layer of stage 3 adds the bias apart); after the update a weight may have rounded to a
# neighbour besides. One unit in the last place of the precision covers both for a loss that is a mean of ten; fp32 has sums of another order.
LOSS_ERROR = {"fp32": 16 * 2.0**-24, "bf16": 2.0**-8, "fp16": 2.0**-11}


def precision_of(case):
    return case.split("_")[1]


def engine_for(case, stage, precision=None):
    """As the run that saved was configured, but for the stage; hyperparameters that the checkpoint must replace are wrong."""
    model = make_model()
    with torch.no_grad():
        for value in (*model.parameters(), model.offset):
            value.add_(1)
    # The cases of make.py that have one group.
    groups = make_groups(model, 1 if any(word in case for word in ("stage0_bf16", "momentum", "subgroups", "host")) else 2)
    config = {"train_micro_batch_size_per_gpu": 2, "gradient_clipping": 1.0,
              "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 50},
              **PRECISIONS[precision or precision_of(case)]}
    extra = {}
    if "momentum" in case:
        extra["optimizer"] = torch.optim.SGD(groups, lr=9.0, momentum=0.1)
        config["zero_allow_untested_optimizer"] = True
    else:
        extra["model_parameters"] = groups
        config["optimizer"] = {"type": "AdamW", "params": {"lr": 9.0, "weight_decay": 0.5, "betas": [0.5, 0.5]}}
    return deepspeed.initialize(model=model, config=config, **extra)[0]


def check_values(engine, case):
    names = dict(engine.module.named_parameters())
    for entry, wanted in expected_of(case).items():
        kind, _, name = entry.partition("/")
        if kind == "fp32":
            found = safe_get_full_fp32_param(names[name])
        elif kind in ("exp_avg", "exp_avg_sq", "momentum_buffer"):
            found = safe_get_full_optimizer_state(names[name], kind)
        elif kind == "weight":
            with deepspeed.zero.GatheredParameters([names[name]]):
                found = names[name].detach().clone()
            wanted = wanted.to(found.dtype)
        elif kind == "buffer":
            found, wanted = engine.module.get_buffer(name), wanted
        else:
            continue
        assert torch.equal(found.cpu().reshape(wanted.shape), wanted), (case, entry)


@pytest.mark.parametrize("case", CASES)
@on_ranks(2)
def test_continues_on_two_ranks(case):
    for stage in range(4):
        continue_at(case, stage)


def continue_at(case, stage):
    engine = engine_for(case, stage)
    path, client = engine.load_checkpoint(FOLDER / case)
    assert Path(path).parent == FOLDER / case
    assert {key: client[key] for key in ("epoch", "note", "history")} == {"epoch": 4, "note": ("a", 1.5), "history": [1, 2]}
    assert client["ds_version"] == "0.19.8" and engine.global_steps == 3
    check_values(engine, case)
    expected = expected_of(case)
    assert [group["lr"] for group in engine.optimizer.param_groups] == pytest.approx(expected["lr"].tolist(), rel=1e-6)
    if precision_of(case) == "fp16":
        assert engine.optimizer.cur_scale == 128.0
    ranks = open_checkpoint(path).world_size
    losses = []
    for step in (3, 4):
        # What the run that saved saw: a run of one rank saw the first rank's batches.
        loss = engine(make_batch(step, dist.get_rank() % ranks))
        engine.backward(loss)
        engine.step()
        losses.append(loss.detach().float())
    losses = torch.stack(losses)
    dist.all_reduce(losses)
    first, second = (losses / 2 / expected["losses"] - 1).abs().tolist()
    said, limit = f"{case}: {losses.tolist()}, expected {expected['losses'].tolist()}", LOSS_ERROR[precision_of(case)]
    assert first <= limit, said
    # The saved run's schedule went on, where it had one; this engine has none, and its last rate stays. And DeepSpeed's stage 0 in fp16 divides the
    # gradients of the update at which the loss scale grows by the new scale.
    if "lr_scheduler" not in open_checkpoint(path).state and not case.startswith("stage0_fp16"):
        assert second <= limit, said
    engine.destroy()


@pytest.mark.parametrize("ranks", [1, 3])
def test_continues_on_other_numbers_of_ranks(ranks):
    from tests.parity.launch import run
    run(continue_all, ranks, timeout=100)


def continue_all():
    for number, case in enumerate(CASES):
        engine = engine_for(case, number % 4)
        engine.load_checkpoint(FOLDER / case)
        check_values(engine, case)
        engine.destroy()


@on_ranks(2)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_precision_may_change(precision):
    for case in ("stage2_fp16", "stage3_bf16", "stage3_fp32_subgroups"):
        engine = engine_for(case, 2, precision)
        engine.load_checkpoint(FOLDER / case)
        check_values(engine, case)
        assert all(torch.isfinite(engine(make_batch(3)).detach()).tolist() for _ in range(1))
        engine.destroy()


@on_ranks(2)
def test_weights_alone():
    engine = engine_for("stage3_bf16", 3)
    engine.load_checkpoint(FOLDER / "stage3_bf16", load_module_only=True)
    expected = expected_of("stage3_bf16")
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(safe_get_full_fp32_param(parameter), expected[f"fp32/{name}"]), name
    assert engine.global_steps == 0 and engine.optimizer.param_groups[0]["lr"] == 9.0


@on_ranks(2)
def test_another_model_is_refused():
    engine = deepspeed.initialize(model=torch.nn.Linear(3, 3), config={"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3},
                                                                      "optimizer": {"type": "AdamW"}})[0]
    with pytest.raises(CheckpointError, match="first.weight"):
        engine.load_checkpoint(FOLDER / "stage3_bf16")
