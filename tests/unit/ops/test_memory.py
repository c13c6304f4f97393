# SPDX-License-Identifier: Apache-2.0
"""What updates do to memory that others look at."""
import pytest
import torch

from deepspeed.ops.adagrad import DeepSpeedCPUAdagrad
from deepspeed.ops.adam import FusedAdam
from deepspeed.ops.lamb import FusedLamb
from deepspeed.ops.lion import FusedLion
from deepspeed.ops.multi_tensor import clip_grad_norm_
from deepspeed.ops.sgd import FusedSGD

OPTIMIZERS = [FusedAdam, FusedLion, FusedLamb, DeepSpeedCPUAdagrad, lambda p: FusedSGD(p, lr=0.1)]


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_autograd_notices_that_a_saved_parameter_was_updated(make):
    p = torch.nn.Parameter(torch.ones(5))
    optimizer = make([p])
    x = torch.ones(5, requires_grad=True)
    out = (x * p).sum()
    p.grad = torch.ones(5)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


def test_autograd_notices_that_a_saved_gradient_was_clipped():
    p = torch.nn.Parameter(torch.ones(5))
    p.grad = torch.full((5,), 10.0)
    x = torch.ones(5, requires_grad=True)
    out = (x * p.grad).sum()
    clip_grad_norm_([p], 1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_a_lazily_negated_gradient_is_the_negative(make):
    grad = torch.randn(7, generator=torch.Generator().manual_seed(0))
    results = []
    for g in (torch._neg_view(grad), -grad):
        p = torch.nn.Parameter(torch.ones(7))
        p.grad = g
        make([p]).step()
        results.append(p.detach().clone())
    assert torch.equal(*results)


def test_arrays_of_one_update_that_share_memory_are_refused():
    base = torch.arange(1.0, 1001.0)
    p = torch.nn.Parameter(base[1:1000])
    p.grad = base[:999]
    before = base.clone()
    with pytest.raises(ValueError, match=r"grads\[0\] shares memory with params\[0\]"):
        FusedSGD([p], lr=0.1).step()
    assert torch.equal(base, before)
    p = torch.nn.Parameter(torch.ones(4))
    p.grad = torch.ones(4)
    optimizer = FusedAdam([p])
    optimizer.step()
    optimizer.state[p]["exp_avg_sq"] = optimizer.state[p]["exp_avg"]
    with pytest.raises(ValueError, match=r"exp_avg_sqs\[0\] shares memory with exp_avgs\[0\]"):
        optimizer.step()


def test_a_gradient_may_be_the_parameter():
    p = torch.nn.Parameter(torch.ones(9))
    p.grad = p.detach()
    FusedSGD([p], lr=0.25).step()
    assert torch.equal(p.detach(), torch.full((9,), 0.75))
