# SPDX-License-Identifier: Apache-2.0
"""The fused optimizers' groups and states: what torch.optim saved is continued, and what is refused leaves no trace."""
import copy
import pickle

import pytest
import torch

from deepspeed.ops.adagrad import DeepSpeedCPUAdagrad
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
from deepspeed.ops.lamb import FusedLamb
from deepspeed.ops.lion import DeepSpeedCPULion, FusedLion
from deepspeed.ops.muon import Muon, MuonWithAuxAdam
from deepspeed.ops.sgd import FusedSGD

NAN = float("nan")
NAMESAKES = {
    "adamw": (torch.optim.AdamW, FusedAdam, {}),
    "adagrad": (torch.optim.Adagrad, DeepSpeedCPUAdagrad, {}),
    "sgd": (torch.optim.SGD, FusedSGD, {}),
    "sgd with momentum": (torch.optim.SGD, FusedSGD, dict(momentum=0.9)),
    "damped sgd": (torch.optim.SGD, FusedSGD, dict(momentum=0.9, dampening=0.5)),
}


def twins(*shapes):
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator) for shape in shapes]
    return [torch.nn.Parameter(v.clone()) for v in values], [torch.nn.Parameter(v.clone()) for v in values]


def step(steps, *pairs, seed=1):
    """Gives every (optimizer, parameters) the same gradients."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        grads = [torch.randn(p.shape, generator=generator) for p in pairs[0][1]]
        for optimizer, params in pairs:
            for p, g in zip(params, grads):
                p.grad = g.to(p.dtype, copy=True)
            optimizer.step()


def assert_near(ours, theirs):
    for p, q in zip(ours, theirs):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-6, atol=1e-7)  # a few updates of float32 roundings each


@pytest.mark.parametrize("case", NAMESAKES)
def test_states_of_torch_are_continued(case):
    torch_kind, kind, options = NAMESAKES[case]
    ours, theirs = twins((3, 5), (7,))
    there = torch_kind(theirs, lr=0.01, **options)
    step(3, (there, theirs))
    with torch.no_grad():
        for p, q in zip(ours, theirs):
            p.copy_(q)
    here = kind(ours, lr=0.5)
    here.load_state_dict(copy.deepcopy(there.state_dict()))
    step(3, (here, ours), (there, theirs), seed=2)
    assert_near(ours, theirs)
    assert all(set(here.state[p]) == {"step", *here._names_in(here.param_groups[0])} for p in ours)


@pytest.mark.parametrize("key", ["maximize", "amsgrad"])
def test_flags_that_change_the_update_are_refused_wherever_they_come_from(key):
    (p, ), (q, ) = twins((3, ))
    there, here = torch.optim.AdamW([q], **{key: True}), FusedAdam([p], lr=0.25)
    step(1, (there, [q]))
    step(1, (here, [p]))
    before = copy.deepcopy(here.state_dict())
    with pytest.raises(ValueError, match=f"FusedAdam: parameter group 0: {key} is not supported"):
        here.load_state_dict(there.state_dict())
    assert here.param_groups[0]["lr"] == 0.25 and torch.equal(here.state[p]["exp_avg"], before["state"][0]["exp_avg"])
    here.param_groups[0][key] = True
    value = p.detach().clone()
    with pytest.raises(ValueError, match=f"FusedAdam: parameter group 0: {key} is not supported"):
        here.step()
    assert torch.equal(p.detach(), value) and here.state[p]["step"] == 1


def test_saved_states_that_do_not_fit_are_refused_by_the_parameters_name():
    first, second = torch.nn.Parameter(torch.ones(4)), torch.nn.Parameter(torch.ones(4))
    optimizer = FusedAdam([("first", first), ("second", second)])
    step(1, (optimizer, [first, second]))
    for change, message in [(lambda s: s.update(exp_avg=torch.ones(1)), r"parameter 'second': the saved exp_avg has shape \[1\], here it is \[4\]"),
                            (lambda s: s.pop("exp_avg_sq"), "saved state of parameter 'second' has no 'exp_avg_sq'")]:
        saved = copy.deepcopy(optimizer.state_dict())
        saved["state"][0]["exp_avg"].fill_(7)
        change(saved["state"][1])
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(saved)
        assert not (optimizer.state[first]["exp_avg"] == 7).any()


def test_refused_groups_are_not_stepped():
    p, q = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3, dtype=torch.float16))
    for options, group in [({}, {"lr": -1.0}), ({}, {"eps": NAN}), ({}, {"maximize": True}), (dict(master="split"), {})]:
        optimizer = FusedAdam([p], lr=0.1, **options)
        with pytest.raises(ValueError, match="group 1|master='split' needs bfloat16"):
            optimizer.add_param_group({"params": [q], **group})
        p.grad, q.grad = torch.ones(3), torch.ones(3, dtype=torch.float16)
        optimizer.step()
        assert len(optimizer.param_groups) == 1 and torch.equal(q.detach(), torch.ones(3, dtype=torch.float16))


@pytest.mark.parametrize("options", [dict(lr=NAN), dict(eps=NAN), dict(weight_decay=NAN)])
def test_numbers_that_are_none_are_refused(options):
    p = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match="must not be negative or NaN, got nan"):
        FusedAdam([p], **options)
    optimizer = FusedAdam([p])
    optimizer.param_groups[0].update(options)
    p.grad = torch.ones(3)
    with pytest.raises(ValueError, match="parameter group 0: .* must not be negative or NaN, got nan"):
        optimizer.step()


@pytest.mark.parametrize("kind", [FusedAdam, DeepSpeedCPUAdam, FusedLamb, FusedLion, DeepSpeedCPULion, DeepSpeedCPUAdagrad, FusedSGD])
def test_flags_of_torch(kind):
    (p, ), (q, ) = twins((9, ))
    flagged = kind([p], lr=0.1, foreach=True, fused=True, capturable=True, differentiable=False, maximize=False, amsgrad=False)
    step(2, (flagged, [p]), (kind([q], lr=0.1), [q]))
    assert torch.equal(p.detach(), q.detach())
    with pytest.raises(ValueError, match="maximize is not supported"):
        kind([p], maximize=True)
    with pytest.raises(TypeError, match=f"{kind.__name__} takes no argument 'mastr'"):
        kind([p], mastr="split")


def test_lamb_ratios_are_in_the_order_of_the_parameters():
    params = [torch.nn.Parameter(torch.full((4, ), i + 1.0)) for i in range(4)]
    optimizer = FusedLamb([{"params": params[:3]}, {"params": params[3:]}], lr=0.0, max_coeff=100.0)
    params[1].grad = torch.ones(4)
    optimizer.step()
    assert optimizer.get_lamb_coeffs() == pytest.approx([2.0], rel=1e-5)
    for p in params:  # their numbers of the update differ now
        p.grad = torch.ones(4)
    optimizer.step()
    assert optimizer.get_lamb_coeffs() == pytest.approx([1.0, 2.0, 3.0, 4.0], rel=1e-5)
    assert pickle.loads(pickle.dumps(optimizer)).get_lamb_coeffs() == optimizer.get_lamb_coeffs()


def test_lamb_spreads_a_norm_that_is_no_number_as_torch_does():
    first, second = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))
    first.grad, second.grad = torch.tensor([NAN, 1, 1]), torch.full((3, ), 1e3)
    twin = copy.deepcopy([first.grad, second.grad])
    FusedLamb([first, second], lr=0.1, max_grad_norm=1.0).step()
    a, b = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))
    a.grad, b.grad = twin
    torch.nn.utils.clip_grad_norm_([a, b], 1.0)
    assert b.grad.isnan().all() and second.detach().isnan().all()


@pytest.mark.parametrize("steps", [1, 3])
def test_sgd_momentum_that_is_raised_later_starts_as_in_torch(steps):
    ours, theirs = twins((3, 5), (7,))
    pairs = [(FusedSGD(ours, lr=0.01, dampening=0.5), ours), (torch.optim.SGD(theirs, lr=0.01, dampening=0.5), theirs)]
    step(steps, *pairs)
    for optimizer, _ in pairs:
        optimizer.param_groups[0]["momentum"] = 0.9
    step(1, *[(optimizer, params[:1]) for optimizer, params in pairs])
    step(3, *pairs, seed=2)  # the second parameter's buffer is made now, and so is none of the first's
    assert_near(ours, theirs)


def test_a_split_masters_low_bits_outlive_a_momentum_that_is_raised_later():
    ours, exact = torch.nn.Parameter(torch.ones(64).bfloat16()), torch.nn.Parameter(torch.ones(64))
    pairs = [(FusedSGD([ours], lr=1e-4, master="split"), [ours]), (FusedSGD([exact], lr=1e-4), [exact])]
    for momentum in (0.0, 0.0, 0.9, 0.9):
        for optimizer, (p, ) in pairs:
            optimizer.param_groups[0]["momentum"] = momentum
            p.grad = torch.full_like(p, 1.0)
            optimizer.step()
    low = pairs[0][0].state[ours]["low_bits"].int() & 0xFFFF
    high = ours.detach().view(torch.int16).int() - (low >> 15)  # the weight is rounded to nearest
    assert torch.equal((high << 16) | low, exact.detach().view(torch.int32))


@pytest.mark.parametrize("kind", [FusedAdam, FusedLamb, DeepSpeedCPUAdagrad, lambda p: FusedSGD(p, momentum=0.9, dampening=0.5)])
def test_a_refused_step_does_not_count(kind):
    good, gapped = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(4, 6)[:, ::2])
    optimizer = kind([good, gapped])
    good.grad, gapped.grad = torch.ones(3), torch.ones(4, 3)
    with pytest.raises(ValueError, match="overlaps itself or has gaps"):
        optimizer.step()
    assert torch.equal(good.detach(), torch.ones(3)) and not optimizer.state[good] and not optimizer.state[gapped]
    gapped.grad = None
    twin = torch.nn.Parameter(torch.ones(3))
    plain = kind([twin])
    step(2, (optimizer, [good]), (plain, [twin]))
    assert torch.equal(good.detach(), twin.detach()) and optimizer.state[good]["step"] == 2
    gapped.grad = torch.ones(4, 3)
    with pytest.raises(ValueError, match="overlaps itself or has gaps"):
        optimizer.step()
    assert optimizer.state[good]["step"] == 3 and not optimizer.state[gapped]  # two batches now: the first was updated, and counts


KINDS = [FusedAdam, DeepSpeedCPUAdam, FusedLamb, FusedLion, DeepSpeedCPULion, DeepSpeedCPUAdagrad, FusedSGD, Muon, MuonWithAuxAdam]


@pytest.mark.parametrize("kind", KINDS)
def test_a_parameter_twice_in_a_group_is_updated_twice(kind):
    """As by torch, which warns of it: with the same gradient, one update after the other."""
    (p, q), (twin, other) = twins((3, 5), (7, 2))
    with pytest.warns(UserWarning, match="duplicate parameters"):
        repeated = kind([p, q, p], lr=0.1)
    once = kind([twin, other], lr=0.1)
    for _ in range(3):
        step(1, (repeated, [p, q]), (once, [twin, other]))
        other.grad = None
        once.step()
    assert torch.equal(p.detach(), twin.detach()) and torch.equal(q.detach(), other.detach())
    assert repeated.state[p].get("step") == once.state[twin].get("step") and repeated.state[q].get("step") == once.state[other].get("step")
    again = pickle.loads(pickle.dumps(repeated))
    a, b = again.param_groups[0]["params"][:2]
    step(1, (again, [a, b]), (once, [twin, other]), seed=2)
    other.grad = None
    once.step()
    assert torch.equal(a.detach(), twin.detach()) and torch.equal(b.detach(), other.detach())


@pytest.mark.parametrize("case", ["adamw", "adagrad", "sgd"])  # torch's momentum begins anew with the second update of the first step
def test_a_parameter_twice_in_a_group_is_updated_as_by_torch(case):
    torch_kind, kind, _ = NAMESAKES[case]
    (p, q), (twin, other) = twins((3, 5), (7,))
    options = dict(lr=0.01, weight_decay=0.1)
    with pytest.warns(UserWarning, match="duplicate parameters"):
        step(3, (kind([p, q, p], **options), [p, q]), (torch_kind([twin, other, twin], foreach=False, **options), [twin, other]))
    assert_near([p, q], [twin, other])


@pytest.mark.parametrize("kind", KINDS)
def test_a_parameter_in_two_groups_is_refused(kind):
    (p, q), _ = twins((3, 5), (7, 2))
    with pytest.raises(ValueError, match="more than one parameter group"):
        kind([{"params": [p, q]}, {"params": [p]}], lr=0.1)
    optimizer = kind([p], lr=0.1)
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": [q, p]})
    assert len(optimizer.param_groups) == 1


def test_sparse_gradients_are_refused_by_the_parameters_name():
    p = torch.nn.Parameter(torch.eye(4))
    p.grad = torch.eye(4).to_sparse()
    with pytest.raises(RuntimeError, match="parameter 'table' has a sparse gradient"):
        FusedAdam([("table", p)]).step()


@pytest.mark.parametrize("kind, options", [(FusedLamb, {}), (FusedAdam, dict(rounding="stochastic"))])
def test_a_parameter_put_into_a_group_by_hand(kind, options):
    ours, theirs = ([torch.nn.Parameter(p.detach().bfloat16()) for p in params] for params in twins((3, 5), (7,), (4,)))
    optimizer = kind(ours[:2], lr=0.1, **options)
    step(1, (optimizer, ours[:2]))
    group = optimizer.param_groups[0]
    group["params"][0] = ours[2]
    fresh = kind([theirs[2], theirs[1]], lr=0.1, **options)
    step(1, (optimizer, [ours[2]]), (fresh, [theirs[2]]), seed=2)
    assert torch.equal(ours[2].detach(), theirs[2].detach())
    if kind is FusedLamb:
        assert len(optimizer.get_lamb_coeffs()) == 2


def test_the_count_of_steps_is_not_shared_with_the_optimizer_that_was_saved():
    ours, theirs = twins((5,))
    there = torch.optim.AdamW(theirs, lr=0.01)
    step(3, (there, theirs))
    here = FusedAdam(ours, lr=0.01)
    here.load_state_dict(there.state_dict())
    step(4, (there, theirs))
    assert here.state[ours[0]]["step"] == 3


def test_a_message_of_the_kernels_names_the_parameter():
    net = torch.nn.ParameterDict({"a": torch.ones(3), "b": torch.ones(3), "c": torch.ones(3, dtype=torch.float64)})
    for name, p in net.items():
        p.grad = None if name == "a" else torch.ones_like(p)
    optimizer = FusedAdam(net.named_parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"FusedAdam: parameter 'c': params\[1\]: dtype must be float32"):
        optimizer.step()
    assert torch.equal(net["b"].detach(), torch.ones(3))


@pytest.mark.parametrize("options, kind, why", [(dict(lr=None), TypeError, "lr must be a number, got None"),
                                                (dict(lr=torch.ones(2)), TypeError, "lr must be a number, got tensor"),
                                                (dict(betas=(0.9,)), ValueError, "betas must be two numbers"),
                                                (dict(betas=(0.9, 0.99, 0.999)), ValueError, "betas must be two numbers"),
                                                (dict(betas=(0.9, None)), TypeError, "betas must be a number, got None")])
def test_what_is_no_number_is_named(options, kind, why):
    with pytest.raises(kind, match=f"FusedAdam: parameter group 0: {why}"):
        FusedAdam([torch.nn.Parameter(torch.ones(3))], **options)


def test_the_scale_of_one_that_lamb_is_called_with():
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    optimizer = FusedLamb([p], lr=0.1)
    optimizer.step(scale=1.0)
    assert (p < 1).all()
    with pytest.raises(RuntimeError, match="takes no grads"):
        optimizer.step(scale=2.0)
