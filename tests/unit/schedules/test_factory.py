# SPDX-License-Identifier: Apache-2.0

import argparse
from types import SimpleNamespace

import pytest
import torch

from deepspeed.schedules import (VALID_LR_SCHEDULES, WarmupLR, add_tuning_arguments, build_scheduler,
                                 get_config_from_args, get_lr_from_config, parse_arguments)

config = pytest.importorskip("deepspeed.config")


def optimizer():
    return torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=0.01)


def test_builds_each_of_ours():
    required = {"OneCycle": dict(cycle_min_lr=0.1, cycle_max_lr=0.2), "WarmupDecayLR": dict(total_num_steps=2000),
                "WarmupCosineLR": dict(total_num_steps=2000)}
    for name in VALID_LR_SCHEDULES:
        built = build_scheduler({"type": name, "params": required.get(name, {})}, optimizer())
        assert type(built).__name__ == name


def test_section_may_be_an_object_and_auto_means_not_given():
    section = SimpleNamespace(type="WarmupLR", params={"warmup_num_steps": "auto", "warmup_max_lr": 0.5})
    built = build_scheduler(section, optimizer())
    assert type(built) is WarmupLR and built.warmup_num_steps == 1000 and built.max_lrs == [0.5]
    assert build_scheduler(SimpleNamespace(type=None, params=None), optimizer()) is None
    assert build_scheduler(None, optimizer()) is None


@pytest.mark.parametrize("name,params", [("StepLR", {"step_size": 2, "gamma": 0.5}), ("CosineAnnealingLR", {"T_max": 5}),
                                         ("ExponentialLR", {"gamma": 0.5})])
def test_any_torch_scheduler(name, params):
    opt = optimizer()
    built = build_scheduler({"type": name, "params": params}, opt)
    assert type(built) is getattr(torch.optim.lr_scheduler, name)
    opt.step(), built.step(), opt.step(), built.step()
    assert built.get_last_lr() == [opt.param_groups[0]["lr"]] and opt.param_groups[0]["lr"] < 0.01


@pytest.mark.parametrize("section,message", [
    ({"type": "WarmupLr"}, r"scheduler.type: unknown schedule 'WarmupLr'; did you mean 'WarmupLR'\?"),
    ({"type": "StepLr"}, r"did you mean 'StepLR'\?"),
    ({"type": "ReduceLROnPlateau"}, "ReduceLROnPlateau needs a metric"),
    ({"type": "LambdaLR"}, "needs a Python function"),
    ({"type": "WarmupLR", "params": {"warmup_num_step": 5}},
     r"scheduler.params.warmup_num_step: .*did you mean 'warmup_num_steps'\?"),
    ({"type": "WarmupDecayLR", "params": {}}, "scheduler.params.total_num_steps: WarmupDecayLR requires it"),
    ({"type": "WarmupDecayLR", "params": {"total_num_steps": "auto"}}, "Hugging Face's Trainer and Accelerate put numbers there"),
    ({"type": "StepLR", "params": {}}, "scheduler.params.step_size"),
    ({"type": "WarmupLR", "params": {"warmup_num_steps": -3}}, "scheduler.params: WarmupLR: warmup_num_steps"),
])  # yapf: disable
def test_errors_name_the_path(section, message):
    with pytest.raises(config.DeepSpeedConfigError, match=message):
        build_scheduler(section, optimizer())


def parse(*argv):
    return add_tuning_arguments(argparse.ArgumentParser()).parse_args(argv)


@pytest.mark.parametrize("name", VALID_LR_SCHEDULES)
def test_flags_to_section_to_schedule(name):
    section, why = get_config_from_args(parse("--lr_schedule", name, "--total_num_steps", "5000"))
    assert why is None and type(build_scheduler(section, optimizer())).__name__ == name


def test_flags_reach_the_section():
    section, _ = get_config_from_args(parse("--lr_schedule", "OneCycle", "--cycle_min_lr", "0.3", "--cycle_momentum",
                                            "--cycle_second_step_size", "7"))
    assert section["params"]["cycle_min_lr"] == 0.3 and section["params"]["cycle_momentum"] is True
    assert section["params"]["cycle_second_step_size"] == 7
    assert "cycle_first_stair_count" not in section["params"]


def test_flags_that_name_no_schedule():
    assert get_config_from_args(parse()) == (None, "--lr_schedule not specified on command line")
    section, why = get_config_from_args(parse("--lr_schedule", "Foo"))
    assert section is None and why.startswith("Foo is not supported LR schedule")


def test_parse_arguments_keeps_the_rest(monkeypatch):
    monkeypatch.setattr("sys.argv", ["script", "--lr_schedule", "WarmupLR", "--other", "1"])
    args, rest = parse_arguments()
    assert args.lr_schedule == "WarmupLR" and rest == ["--other", "1"]


@pytest.mark.parametrize("section,expected", [
    ({"type": "WarmupLR", "params": {"warmup_max_lr": 0.4}}, (0.4, "")),
    ({"type": "WarmupDecayLR", "params": {"warmup_max_lr": 0.4}}, (0.4, "")),
    ({"type": "OneCycle", "params": {"cycle_max_lr": 3}}, (3, "")),
    ({"type": "LRRangeTest", "params": {"lr_range_test_min_lr": 4}}, (4, "")),
    ({}, (None, "LR schedule type not defined in config")),
    (None, (None, "LR schedule type not defined in config")),
    ({"type": "WarmupLR"}, (None, "LR schedule params not defined in config")),
    ({"type": "x", "params": {}}, (None, "x is not a valid LR schedule")),
    ({"type": "WarmupLR", "params": {}}, (None, "warmup_max_lr not defined in the params of WarmupLR")),
])  # yapf: disable
def test_rate_of_a_section(section, expected):
    assert get_lr_from_config(section) == expected


def test_cosine_has_no_rate():
    rate, why = get_lr_from_config({"type": "WarmupCosineLR", "params": {"total_num_steps": 5}})
    assert rate is None and "WarmupCosineLR" in why
