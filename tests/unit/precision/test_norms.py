# SPDX-License-Identifier: Apache-2.0
"""Norms and clipping against torch's own, and over model parallel ranks against the whole."""
import math
import types

import pytest
import torch

from deepspeed import comm as dist
from deepspeed.runtime.utils import (clip_grad_norm_, clip_tensors_by_global_norm, get_global_norm, get_global_norm_of_tensors, get_grad_norm,
                                     get_weight_norm, is_model_parallel_parameter)
from tests.parity.launch import on_ranks

# Sums of squares in fp32 per tensor, added in fp64: torch does the same in fp32, so they differ by a few roundings.
RELATIVE = 8 * torch.finfo(torch.float32).eps


def parameters(seed=0):
    generator = torch.Generator().manual_seed(seed)
    made = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((3, 4), (5,), ())]
    for parameter in made:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    return made + [torch.nn.Parameter(torch.ones(2))]  # the last has no gradient


@pytest.mark.parametrize("norm_type", [1, 2, 3.0, math.inf])
@pytest.mark.parametrize("max_norm", [0.1, 1000.0])
def test_clip_equals_torch(norm_type, max_norm):
    ours, theirs = parameters(), parameters()
    norm = clip_grad_norm_(ours, max_norm, norm_type)
    expected = torch.nn.utils.clip_grad_norm_(theirs, max_norm, norm_type)
    torch.testing.assert_close(norm, expected, rtol=RELATIVE, atol=0)
    for a, b in zip(ours[:3], theirs[:3]):
        torch.testing.assert_close(a.grad, b.grad, rtol=2 * RELATIVE, atol=0)


def test_one_tensor_and_none():
    parameter = parameters()[0]
    norm = clip_grad_norm_(parameter, 1e9)
    assert float(norm) == pytest.approx(float(parameter.grad.norm()), rel=RELATIVE)
    assert float(clip_grad_norm_([], 1.0)) == 0.0 == get_grad_norm([])
    with pytest.raises(ValueError, match="norm_type"):
        clip_grad_norm_([parameter], 1.0, norm_type=0)


def test_norms_that_are_not_finite_are_minus_one():
    broken = parameters()
    broken[1].grad[0] = math.nan
    assert get_grad_norm(broken) == -1.0 and get_weight_norm(broken) > 0
    assert float(get_global_norm_of_tensors([torch.tensor([math.inf])])) == -1.0


def test_weight_norm_and_global_norm():
    made = parameters()
    flat = torch.cat([p.detach().reshape(-1) for p in made])
    assert get_weight_norm(made) == pytest.approx(float(flat.norm()), rel=RELATIVE)
    assert get_global_norm([3.0, torch.tensor(4.0)]) == 5.0


def test_clip_tensors():
    tensors = [torch.full((4,), 3.0), torch.full((4,), 4.0)]
    norm = clip_tensors_by_global_norm(tensors, max_norm=1.0)
    assert float(norm) == pytest.approx(10.0) and tensors[0][0].item() == pytest.approx(0.3, rel=1e-6)
    clip_tensors_by_global_norm(tensors, max_norm=5.0, global_norm=1.0)
    assert tensors[0][0].item() == pytest.approx(0.3, rel=1e-6)


def test_marks_of_model_parallel_parameters():
    parameter = torch.nn.Parameter(torch.ones(1))
    assert not is_model_parallel_parameter(parameter)
    parameter.tensor_model_parallel = True
    assert is_model_parallel_parameter(parameter)


@on_ranks(2)
@pytest.mark.parametrize("norm_type", [2, math.inf])
def test_over_model_parallel_ranks(norm_type):
    """A weight split by rows and a bias that both ranks hold: the norm is that of the unsplit model."""
    rank = dist.get_rank()
    mpu = types.SimpleNamespace(get_model_parallel_rank=lambda: rank, get_model_parallel_group=dist.get_world_group)
    whole, bias = parameters()[0].grad.repeat(2, 1) * torch.arange(1.0, 7.0)[:, None], torch.arange(3.0)
    split, shared = torch.nn.Parameter(torch.zeros(3, 4)), torch.nn.Parameter(torch.zeros(3))
    split.model_parallel = True
    split.grad, shared.grad = whole[3 * rank:3 * rank + 3].clone(), bias.clone()
    expected = torch.linalg.vector_norm(torch.cat([whole.reshape(-1), bias]), norm_type).item()
    assert get_grad_norm([split, shared], norm_type, mpu) == pytest.approx(expected, rel=RELATIVE)
    assert float(clip_grad_norm_([split, shared], 1.0, norm_type, mpu)) == pytest.approx(expected, rel=RELATIVE)
    assert shared.grad[2].item() == pytest.approx(2.0 / (expected + 1e-6), rel=4 * RELATIVE)
