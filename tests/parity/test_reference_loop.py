# SPDX-License-Identifier: Apache-2.0
"""The oracle itself, against DistributedDataParallel on two ranks and against arithmetic done by hand."""
import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from tests.parity.cases import CASES
from tests.parity.launch import run
from tests.parity.reference_loop import Reference, Tolerance, adamw, close, reference_loop


def train_ddp(name, steps, accumulation):
    case = CASES[name]
    model = case.build()
    ddp = DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = adamw([p for p in model.parameters() if p.requires_grad])
    losses = []
    for step in range(steps):
        for micro in range(accumulation):
            ddp.require_backward_grad_sync = micro == accumulation - 1
            loss = ddp(*case.batch(step, micro, dist.get_rank()))
            (loss / accumulation).backward()
            losses.append(loss.item())
        for p in model.parameters():
            if p.requires_grad and p.grad is None:
                p.grad = torch.zeros_like(p)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return torch.tensor(losses, dtype=torch.float64).view(steps, accumulation), {n: p.detach() for n, p in model.named_parameters()}


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("name", ["gpt", "tied", "odd", "zero_dim", "frozen"])
def test_equals_ddp(name, accumulation):
    ranks = run(train_ddp, 2, name, 10, accumulation)
    got = Reference(torch.stack([losses for losses, _ in ranks], -1), ranks[0][1], [])
    close(got, reference_loop(CASES[name], 2, 10, accumulation))


@pytest.mark.parametrize("name", ["unused", "routed"])
def test_equals_ddp_when_ranks_differ(name):
    ranks = run(train_ddp, 2, name, 10, 1)
    got = Reference(torch.stack([losses for losses, _ in ranks], -1), ranks[0][1], [])
    close(got, reference_loop(CASES[name], 2, 10))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_within_its_own_bounds(name, dtype):
    options = dict(loss_scale=1024.0) if dtype == torch.float16 else {}
    bounds = Tolerance.measure(CASES[name], 2, 5, dtype=dtype, **options)
    plain = reference_loop(CASES[name], 2, 5, dtype=dtype, **options)
    bounds.check(plain.losses, plain.parameters)
    wrong = {**plain.parameters, "first.weight" if "first.weight" in plain.parameters else next(iter(plain.parameters)): torch.zeros(())}
    with pytest.raises(AssertionError, match="off by"):
        bounds.check(plain.losses, wrong)


@pytest.mark.parametrize("unused", ["zeros", "skip"])
def test_a_parameter_without_gradient(unused):
    case = CASES["unused"]
    before = case.build().never.weight.detach()
    after = reference_loop(case, 2, 1, unused=unused).parameters["never.weight"]
    expected = before * (1 - 1e-3 * 0.01) if unused == "zeros" else before
    assert torch.equal(after, expected)


def test_clip_and_schedule():
    case = CASES["odd"]
    free = reference_loop(case, 2, 3)
    clipped = reference_loop(case, 2, 3, clip=free.norms[0] / 2, optimizer=_sgd, lr_at=_only_first)
    before = case.build().third.bias.detach()
    moved = reference_loop(case, 2, 1, optimizer=_sgd).parameters["third.bias"] - before
    assert free.norms[0] == clipped.norms[0]
    # clip_grad_norm_ divides by norm + 1e-6, hence not exactly one half
    torch.testing.assert_close(clipped.parameters["third.bias"] - before, moved / 2, rtol=1e-5, atol=0)


def _sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


def _only_first(step):
    return 0.1 if step == 0 else 0.0
