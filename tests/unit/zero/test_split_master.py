# SPDX-License-Identifier: Apache-2.0
"""A SplitValues reads like the float32 tensor it stands for, and writing into it writes both halves."""
import copy
import io

import pytest
import torch

from deepspeed._native import lib
from deepspeed.zero.split_master import SplitValues, follow
from deepspeed.zero.tensors import in_memory_order, shaped_like


def split_of(values):
    flat = values.reshape(-1)
    weights, low = torch.empty(flat.numel(), dtype=torch.bfloat16), torch.empty(flat.numel(), dtype=torch.int16)
    lib().write_split(flat, weights, low)
    return SplitValues(weights, low, values.shape)


def bits(values):
    return values.contiguous().view(torch.int32)


@pytest.fixture
def values():
    """All kinds of exponents, ties, zeros, and more than the kernels take at a time."""
    generator = torch.Generator().manual_seed(0)
    raw = torch.randint(-2**31, 2**31, (1 << 20,), generator=generator, dtype=torch.int64).to(torch.int32)
    raw[:64] = (raw[:64] & ~0xFFFF) | 0x8000
    raw[64] = 0
    found = raw.view(torch.float32)
    return torch.cat([torch.where(found.isnan() | (found.abs() > 3e38), 1.5, found), torch.randn(77, generator=generator)])


def test_reads_are_exact(values):
    split = split_of(values)
    assert torch.equal(bits(split.made()), bits(values))
    assert (split.shape, split.dtype, split.numel(), split.element_size(), split.device) == (values.shape, torch.float32, values.numel(), 4, values.device)
    target = torch.empty_like(values)
    assert torch.equal(bits(target.copy_(split)), bits(values))
    assert torch.equal(torch.empty(values.shape, dtype=torch.float64).copy_(split), values.double())
    assert torch.equal(bits(split[100:300].made()), bits(values[100:300]))
    assert torch.equal(bits(split.narrow(0, 5, 9).clone()), bits(values[5:14]))
    assert split[7].item() == values[7].item() and split[3:6].tolist() == values[3:6].tolist()
    assert (split[3:6].numpy() == values[3:6].numpy()).all()
    assert torch.equal(split[:50] * 2 + 1, values[:50] * 2 + 1)
    assert torch.equal(split.to(torch.bfloat16), values.to(torch.bfloat16)) and type(split.clone()) is torch.Tensor
    assert "SplitValues(tensor(" in repr(split)


def test_weights_are_rounded_away_from_zero_at_ties(values):
    split = split_of(values)
    want = ((values.view(torch.int32).long() + 0x8000) >> 16).to(torch.int16)
    assert torch.equal(split.weights.view(torch.int16), want)


def test_writes_reach_both_halves(values):
    split = split_of(torch.zeros_like(values))
    assert split.copy_(values) is split and torch.equal(bits(split.made()), bits(values))
    small = torch.randn(40)
    part = split_of(small)
    part.mul_(1.3).add_(part, alpha=0.5)
    want = small * 1.3
    assert torch.equal(part.made(), want.add_(want, alpha=0.5))
    part[5:9].zero_()
    part[10:20].copy_(torch.arange(10))
    want[5:9], want[10:20] = 0, torch.arange(10)
    assert torch.equal(part.made(), want)
    part.copy_(torch.tensor(0.3))
    assert torch.equal(part.made(), torch.full((40,), 0.3))
    versions = part.weights._version, part.low_bits._version
    part[3:].copy_(split_of(small[3:]))
    part[:3].copy_(small[:3])
    assert torch.equal(part.made(), small)
    assert part.weights._version > versions[0] and part.low_bits._version > versions[1]


def test_as_a_parameter_of_any_layout():
    value = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)
    flat = split_of(in_memory_order(value, value))
    parameter = torch.nn.Parameter(shaped_like(flat, value))
    assert isinstance(parameter, torch.nn.Parameter) and parameter.requires_grad and parameter.is_leaf
    assert torch.equal(parameter.detach().made(), value) and torch.equal(parameter.data + 0, value) and parameter.stride() == value.stride()
    with torch.no_grad():
        parameter.add_(1)
    parameter.data.mul_(2)
    assert torch.equal(parameter.data.clone(), (value + 1) * 2)
    assert torch.equal(flat.made(), in_memory_order((value + 1) * 2, value))
    plain = torch.nn.Parameter(split_of(torch.randn(6, 5)))
    plain.data.view(-1).fill_(2.5)
    assert plain.data.clone().eq(2.5).all() and plain.view(5, 6).shape == (5, 6)
    (plain * 3).sum().backward()
    assert torch.equal(plain.grad, torch.full((6, 5), 3.0))


def test_copies_are_plain_tensors():
    value = torch.randn(9)
    split = split_of(value)
    file = io.BytesIO()
    torch.save({"fp32": split}, file)
    file.seek(0)
    for found in (copy.deepcopy(split), torch.load(file, weights_only=True)["fp32"]):
        assert type(found) is torch.Tensor and torch.equal(found, value)


def test_followers_keep_the_digits_of_what_nobody_has_written():
    value = torch.randn(1000)
    value.view(torch.int32)[::10] = value.view(torch.int32)[::10] & ~0xFFFF | 0x8000   # ties
    for rounded in (value.to(torch.bfloat16), split_of(value).weights.clone()):
        split, whole = split_of(value), value.clone()
        written = rounded.clone()
        written[::7] = 100.0
        follow(split, written)
        want = value.clone()
        want[::7] = 100.0
        assert torch.equal(split.made(), want)
    before = split_of(value)
    split = SplitValues(before.weights.clone(), before.low_bits)
    split.weights[::7] = 100.0   # where the weights themselves have been written over
    follow(split, split.weights.clone(), before.weights)
    assert torch.equal(split.made(), want)
    follow(whole, value.to(torch.bfloat16))
    assert torch.equal(whole, value)


def test_bad_arguments_are_named():
    weights, low = torch.zeros(4, dtype=torch.bfloat16), torch.zeros(4, dtype=torch.int16)
    with pytest.raises(ValueError, match="weights must be"):
        lib().read_split(weights.half(), low, torch.zeros(4))
    with pytest.raises(ValueError, match="low_bits must be"):
        lib().read_split(weights, low[:3], torch.zeros(4))
    with pytest.raises(ValueError, match="values must be"):
        lib().write_split(torch.zeros(5), weights, low)
