# SPDX-License-Identifier: Apache-2.0
"""Each schedule against its written formula and against number sequences of the field's existing schedules."""

import math

import pytest
import torch

from deepspeed.schedules import (LRRangeTest, OneCycle, VALID_LR_SCHEDULES, WarmupCosineLR, WarmupDecayLR, WarmupLR,
                                 get_torch_optimizer, update_lr)

CLASSES = {cls.__name__: cls for cls in (LRRangeTest, OneCycle, WarmupLR, WarmupDecayLR, WarmupCosineLR)}


def optimizer(groups=1, cls=torch.optim.AdamW, lr=0.01):
    return cls([{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr * (i + 1)} for i in range(groups)], lr=lr)


def sequence(schedule, steps):
    """Rates of all groups: before the first step, then after each."""
    groups = schedule.optimizer.param_groups
    rows = [[float(group["lr"]) for group in groups]]
    for _ in range(steps):
        schedule.step()
        rows.append([float(group["lr"]) for group in groups])
    return rows


def close(rows, expected):
    assert len(rows) == len(expected)
    for row, want in zip(rows, expected):
        want = want if isinstance(want, list) else [want]
        # 8 decimals are stored below, so half a unit of the last.
        assert row == pytest.approx(want, rel=1e-12, abs=0.5001e-8)


# (class, arguments, groups, rates before the first step and after steps 1, 2, ...): stored to 8 decimals.
SEQUENCES = [
    ("WarmupLR", dict(warmup_max_lr=0.1, warmup_num_steps=4), 1,
     [0, 0, 0.05, 0.07924813, 0.1, 0.1]),
    ("WarmupLR", dict(warmup_num_steps=4, warmup_type="linear"), 2,
     [[0, 0], [0, 0], [0.0025, 0.005], [0.005, 0.01], [0.0075, 0.015], [0.01, 0.02], [0.01, 0.02]]),
    ("WarmupLR", dict(warmup_min_lr=0.02, warmup_max_lr=0.1, warmup_num_steps=1), 1,
     [0.02, 0.02, 0.1, 0.1]),
    ("WarmupDecayLR", dict(total_num_steps=2, warmup_num_steps=3, warmup_type="linear"), 1,
     [0, 0, 0.00033333, 0.00066667, 0, 0]),
    ("WarmupCosineLR", dict(total_num_steps=8, warmup_num_steps=3), 2,
     [[0, 0], [0, 0], [0.0063093, 0.0126186], [0.01, 0.02], [0.00904518, 0.01809036], [0.00654543, 0.01309086],
      [0.00345557, 0.00691114], [0.00095582, 0.00191164], [1e-6, 2e-6], [1e-6, 2e-6]]),
    ("WarmupCosineLR",
     dict(total_num_steps=8, warmup_num_steps=3, warmup_type="linear", warmup_min_ratio=0.1, cos_min_ratio=0.2), 1,
     [0, 0.001, 0.004, 0.007, 0.00923607, 0.00723607, 0.00476393, 0.00276393, 0.002, 0.002]),
    ("WarmupCosineLR", dict(total_num_steps=3, warmup_num_steps=3), 1,
     [0, 0, 0.0063093, 0.01, 1e-6, 1e-6]),
    ("LRRangeTest", dict(lr_range_test_min_lr=0.01, lr_range_test_step_size=3, lr_range_test_step_rate=2.0), 1,
     [0.01, 0.01666667, 0.02333333, 0.03, 0.03666667]),
    ("LRRangeTest", dict(lr_range_test_min_lr=[0.01, 0.03], lr_range_test_step_size=3, lr_range_test_staircase=True), 2,
     [[0.01, 0.03]] * 3 + [[0.02, 0.06]] * 3 + [[0.03, 0.09]]),
    ("OneCycle", dict(cycle_min_lr=0.01, cycle_max_lr=0.1, cycle_first_step_size=3), 1,
     [0.01, 0.04, 0.07, 0.1, 0.07, 0.04, 0.01, 0.01, 0.01]),
    ("OneCycle",
     dict(cycle_min_lr=0.01, cycle_max_lr=0.1, cycle_first_step_size=4, cycle_second_step_size=2, decay_step_size=2,
          decay_lr_rate=0.5), 1,
     [0.01, 0.0325, 0.055, 0.0775, 0.1, 0.055, 0.01, 0.008, 0.00666667, 0.00571429, 0.005]),
    ("OneCycle",
     dict(cycle_min_lr=0.01, cycle_max_lr=0.1, cycle_first_step_size=6, cycle_first_stair_count=2, decay_step_size=3,
          decay_lr_rate=0.5), 1,
     [0.01, 0.01, 0.01, 0.055, 0.055, 0.055, 0.1, 0.055, 0.055, 0.055, 0.01, 0.01, 0.01]),
    ("OneCycle",
     dict(cycle_min_lr=[0.01, 0.02], cycle_max_lr=[0.1, 0.3], cycle_first_step_size=4, cycle_first_stair_count=2,
          cycle_second_stair_count=4), 2,
     [[0.01, 0.02], [0.01, 0.02], [0.055, 0.16], [0.055, 0.16], [0.1, 0.3], [0.0775, 0.23], [0.055, 0.16],
      [0.0325, 0.09], [0.01, 0.02], [0.01, 0.02]]),
    ("OneCycle", dict(cycle_min_lr=0.01, cycle_max_lr=0.1, cycle_first_step_size=3, cycle_second_step_size=0), 1,
     [0.01, 0.04, 0.07, 0.01, 0.01]),
]  # yapf: disable


@pytest.mark.parametrize("name,kwargs,groups,expected", SEQUENCES)
def test_stored_sequences(name, kwargs, groups, expected):
    close(sequence(CLASSES[name](optimizer(groups), **kwargs), len(expected) - 1), expected)


@pytest.mark.parametrize("kind", ["log", "linear"])
@pytest.mark.parametrize("warmup,total", [(1, 5), (3, 9), (10, 10), (10, 40)])
def test_warmup_decay_follows_its_formula(kind, warmup, total):
    low, high, n = 0.002, 0.05, max(2, warmup)
    schedule = WarmupDecayLR(optimizer(), total, low, high, warmup, kind)
    expected = [low]
    for t in range(total + 5):
        if t < n:
            factor = math.log(t + 1) / math.log(n) if kind == "log" else t / n
        else:
            factor = max(0.0, (total - t) / max(1, total - n))
        expected.append(low + (high - low) * factor)
    close(sequence(schedule, total + 5), expected)


def test_one_cycle_momentum_runs_against_the_rate():
    opt = optimizer()
    schedule = OneCycle(opt, 0.01, 0.1, cycle_first_step_size=4, cycle_second_step_size=2, decay_step_size=2,
                        decay_mom_rate=0.1)
    moms = [opt.param_groups[0]["betas"][0]]
    for _ in range(8):
        schedule.step()
        moms.append(opt.param_groups[0]["betas"][0])
    assert moms == pytest.approx([0.8, 0.875, 0.85, 0.825, 0.8, 0.85, 0.9, 0.945, 0.99], rel=1e-12)
    assert schedule.get_mom() == [(moms[-1], 0.99)] and opt.param_groups[0]["betas"][1] == 0.99


def test_one_cycle_leaves_the_momentum_alone_when_asked_or_when_there_is_none():
    opt = optimizer()
    schedule = OneCycle(opt, 0.01, 0.1, cycle_momentum=False)
    schedule.step()
    assert opt.param_groups[0]["betas"] == (0.9, 0.999) and schedule.get_mom() is None
    with pytest.warns(UserWarning, match="cycle_momentum: SGD has no betas"):
        OneCycle(optimizer(cls=torch.optim.SGD), 0.01, 0.1).step()


def test_stairs_count_in_whole_numbers():
    """29 of 100 steps with 100 stairs is stair 29; 0.29 * 100 is 28.999999999999996 in floats."""
    schedule = OneCycle(optimizer(), 0.0, 1.0, cycle_first_step_size=100, cycle_first_stair_count=100)
    schedule.step(28)
    assert schedule.get_last_lr() == [0.29]


@pytest.mark.parametrize("value", [0, 0.0, 1, 2])
def test_warmup_steps_below_two_count_as_two(value):
    schedule = WarmupLR(optimizer(), warmup_max_lr=0.1, warmup_num_steps=value)
    assert schedule.warmup_num_steps == 2
    close(sequence(schedule, 3), [0, 0, 0.1, 0.1])


def test_integral_floats_are_integers():
    assert WarmupLR(optimizer(), warmup_num_steps=1e3).warmup_num_steps == 1000
    assert type(WarmupDecayLR(optimizer(), 2e3, warmup_num_steps=1e3).total_num_steps) is int


@pytest.mark.parametrize("cls,kwargs,message", [
    (WarmupLR, dict(warmup_num_steps=-1), r"warmup_num_steps: .* at least 0, got -1"),
    (WarmupLR, dict(warmup_num_steps=2.5), "warmup_num_steps: .*got 2.5"),
    (WarmupLR, dict(warmup_num_steps=True), "warmup_num_steps"),
    (WarmupLR, dict(warmup_num_steps="many"), "warmup_num_steps: expected a number, got 'many'"),
    (WarmupLR, dict(warmup_min_lr=[1, 2]), "warmup_min_lr: 2 values for 1 parameter groups"),
    (WarmupLR, dict(warmup_max_lr=float("nan")), "warmup_max_lr: expected a finite number"),
    (WarmupDecayLR, dict(total_num_steps=0), "total_num_steps"),
    (WarmupCosineLR, dict(total_num_steps=10, cos_min_ratio=None), "cos_min_ratio"),
    (LRRangeTest, dict(lr_range_test_step_size=0), "lr_range_test_step_size"),
    (LRRangeTest, dict(lr_range_test_min_lr=[0.1] * 3), "lr_range_test_min_lr: 3 values"),
    (OneCycle, dict(cycle_min_lr=0.1, cycle_max_lr=1, cycle_first_step_size=0), "cycle_first_step_size"),
    (OneCycle, dict(cycle_min_lr=0.1, cycle_max_lr=1, cycle_second_step_size=-1), "cycle_second_step_size"),
])  # yapf: disable
def test_bad_arguments_are_named(cls, kwargs, message):
    with pytest.raises(ValueError, match=message):
        cls(optimizer(), **kwargs)


def test_warnings():
    with pytest.warns(UserWarning, match="warmup_type: unknown value 'foo'"):
        assert WarmupLR(optimizer(), warmup_type="foo").warmup_type == "log"
    with pytest.warns(UserWarning, match=r"total_num_steps \(5\) is less than warmup_num_steps \(10\)"):
        WarmupDecayLR(optimizer(), 5, warmup_num_steps=10)


ALL = [
    (WarmupLR, dict(warmup_max_lr=0.1, warmup_num_steps=5)),
    (WarmupDecayLR, dict(total_num_steps=12, warmup_num_steps=5)),
    (WarmupCosineLR, dict(total_num_steps=12, warmup_num_steps=5)),
    (LRRangeTest, dict(lr_range_test_step_size=3)),
    (OneCycle, dict(cycle_min_lr=0.01, cycle_max_lr=0.1, cycle_first_step_size=4, decay_step_size=2,
                    decay_lr_rate=0.5)),
]  # yapf: disable


@pytest.mark.parametrize("cls,kwargs", ALL)
@pytest.mark.parametrize("stop", [0, 1, 4, 9])
def test_saved_and_resumed_is_the_same_run(cls, kwargs, stop):
    whole = cls(optimizer(2), **kwargs)
    rows = sequence(whole, 15)

    first = cls(optimizer(2), **kwargs)
    sequence(first, stop)
    state = first.state_dict()
    assert state == {"last_batch_iteration": stop - 1}

    second = cls(optimizer(2), **kwargs)
    second.load_state_dict(state)
    assert second.get_last_lr() == first.get_last_lr() == rows[stop]
    assert sequence(second, 15 - stop) == rows[stop:]


@pytest.mark.parametrize("cls,kwargs", ALL)
def test_jump_to_a_step(cls, kwargs):
    rows = sequence(cls(optimizer(), **kwargs), 10)
    schedule = cls(optimizer(), **kwargs)
    schedule.step(6)
    assert schedule.get_last_lr() == rows[7] and schedule.last_batch_iteration == 6


@pytest.mark.parametrize("cls,kwargs", ALL)
def test_last_lr_before_and_after_stepping(cls, kwargs):
    opt = optimizer(2)
    schedule = cls(opt, **kwargs)
    assert schedule.get_last_lr() == schedule.get_lr() == [group["lr"] for group in opt.param_groups]
    schedule.step()
    assert schedule.get_last_lr() == [group["lr"] for group in opt.param_groups]


def test_tensor_rates_keep_their_identity():
    opt = optimizer()
    tensor = opt.param_groups[0]["lr"] = torch.tensor(0.01)
    schedule = WarmupLR(opt, warmup_max_lr=0.5, warmup_num_steps=2)
    schedule.step(), schedule.step()
    assert opt.param_groups[0]["lr"] is tensor and tensor.item() == 0.5


def test_writes_go_to_the_shared_group_dicts():
    """A wrapper that forwards param_groups, and everyone who holds the dicts, sees the new rate."""
    opt = optimizer()
    group = opt.param_groups[0]

    class Wrapper:
        def __init__(self):
            self.optimizer = opt

        param_groups = property(lambda self: self.optimizer.param_groups)

    schedule = WarmupLR(Wrapper(), warmup_max_lr=0.5, warmup_num_steps=2)
    schedule.step(), schedule.step()
    assert group["lr"] == 0.5 and opt.param_groups[0] is group


def test_helpers():
    opt = optimizer(2)
    assert get_torch_optimizer(opt) is opt
    with pytest.raises(TypeError, match="int is neither"):
        get_torch_optimizer(3)
    assert update_lr(opt.param_groups, [0.5, 0.6]) == [0.5, 0.6]
    with pytest.raises(ValueError, match="1 values for 2 parameter groups"):
        update_lr(opt.param_groups, [0.5])
    assert VALID_LR_SCHEDULES == ["LRRangeTest", "OneCycle", "WarmupLR", "WarmupDecayLR", "WarmupCosineLR"]


def test_a_bad_state_is_refused():
    schedule = WarmupLR(optimizer())
    with pytest.raises(ValueError, match="last_batch_iteration"):
        schedule.load_state_dict({})
