# SPDX-License-Identifier: Apache-2.0
"""Blockwise quantisation on a GPU has the bits of the CPU, which tests/unit/ops/test_quantizer.py compares with the definition."""
import pytest
import torch

from deepspeed.ops import quantizer
from deepspeed.ops._library import ops

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
KINDS = [(name, True) for name in quantizer.FORMATS] + [("int8", False), ("int4", False)]
GROUPS = (1, 3, 20, 64, 100, 256, 1000, 2048, 3001)  # every kind of team, whole and ragged units
SIZES = (1, 8, 63, 4099, 70_001)


def awkward(n, dtype, offset=0):
    x = torch.randn(n + offset) * torch.randint(-12, 3, (n + offset,)).float().exp2()
    x[torch.rand(n + offset) < 0.1] = 0
    x[torch.rand(n + offset) < 0.0005] = float("nan")
    x[torch.rand(n + offset) < 0.0005] = -float("inf")
    return x.to(dtype)[offset:]


def moved(x):
    """On the GPU, at the same distance from an aligned address."""
    base = torch.empty(x.numel() + x.storage_offset(), dtype=x.dtype, device="cuda")
    return base[x.storage_offset():].copy_(x)


def same(got, want):
    for name in ("data", "scale", "zero_point"):
        a, b = getattr(got, name).cpu(), getattr(want, name)
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8)), name


def equal(a, b):
    torch.testing.assert_close(a.cpu(), b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("format, symmetric", KINDS)
@pytest.mark.parametrize("group", GROUPS)
def test_bits_of_the_cpu(format, symmetric, group):
    torch.manual_seed(group)
    for n in SIZES:
        for dtype, offset in ((torch.float32, 0), (torch.float32, 1), (torch.bfloat16, 0), (torch.bfloat16, 3), (torch.float16, 8)):
            x = awkward(n, dtype, offset)
            gpu = moved(x)
            for stochastic in (False, True)[:1 if dtype == torch.float16 else 2]:
                rounding = dict(stochastic=stochastic, seed=11, offset=4)
                want, got = (quantizer.quantize(t, format, group, symmetric, **rounding) for t in (x, gpu))
                same(got, want)
                equal(quantizer.dequantize(got), quantizer.dequantize(want))
                fake = dict(format=format, group_size=group, symmetric=symmetric, **rounding)
                equal(quantizer.fake_quantize(gpu, **fake), quantizer.fake_quantize(x, **fake))
                residual = torch.randn(n) * 0.01
                residual_gpu = residual.cuda()
                want, got = (quantizer.quantize(t, format, group, symmetric, residual=r, **rounding)
                             for t, r in ((x, residual), (gpu, residual_gpu)))
                same(got, want)
                equal(residual_gpu, residual)


@pytest.mark.parametrize("format, symmetric", KINDS)
@pytest.mark.parametrize("group", (3, 64, 1000, 3001))
def test_reduce_has_the_bits_of_the_cpu(format, symmetric, group):
    torch.manual_seed(group)
    for n in SIZES:
        for ranks in (1, 2, 5, 64):
            chunks = [quantizer.quantize(awkward(n, torch.float32), format, group, symmetric) for _ in range(ranks)]
            there = [quantizer.QuantizedTensor(c.data.cuda(), c.scale.cuda(), c.zero_point.cuda(), format, group, c.shape, c.dtype)
                     for c in chunks]
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                equal(quantizer.dequantize_reduce(there, True, dtype), quantizer.dequantize_reduce(chunks, True, dtype))
            for out_format, out_symmetric in ((format, symmetric), ("int8", False), ("fp6_e3m2", True)):
                arguments = dict(format=out_format, symmetric=out_symmetric, dtype=torch.bfloat16, stochastic=True, seed=3)
                got, want = (quantizer.dequantize_reduce_quantize(c, **arguments) for c in (there, chunks))
                same(got[0], want[0])
                equal(got[1], want[1])


def test_bytes_at_odd_addresses():
    x = torch.randn(1000)
    for format, symmetric in KINDS:
        q = quantizer.quantize(x, format, 64, symmetric)
        odd = torch.empty(q.data.numel() + 1, dtype=torch.uint8, device="cuda")[1:].copy_(q.data)
        there = quantizer.QuantizedTensor(odd, q.scale.cuda(), q.zero_point.cuda(), format, 64, q.shape, q.dtype)
        equal(quantizer.dequantize(there), quantizer.dequantize(q))


def test_operators_are_registered_as_torch_wants():
    x = torch.randn(6, 50, device="cuda")
    q = quantizer.quantize(x, "int4", 16, False)
    calls = [("quantize", (x, "int4", 16, False)), ("quantize_feedback", (x, torch.zeros_like(x), "int8", 16)),
             ("dequantize", (q.data, q.scale, q.zero_point, [6, 50], "int4", 16)),
             ("dequantize_reduce", ([q.data], [q.scale], [q.zero_point], [6, 50], "int4", 16, 1.0, torch.float32, "int8")),
             ("fake_quantize", (x.clone().requires_grad_(), "int8", 16))]
    for name, arguments in calls:
        torch.library.opcheck(getattr(ops(), name).default, arguments)


def test_refused_by_name():
    q = quantizer.quantize(torch.zeros(8, device="cuda"), "int8", 4)
    with pytest.raises(ValueError, match="scale lies on cpu"):
        ops().dequantize(q.data, q.scale.cpu(), None, [8], "int8", 4)
    with pytest.raises(ValueError, match="data: at most 64"):
        quantizer.dequantize_reduce([q] * 65)
    with pytest.raises(ValueError, match="residual lies on cpu"):
        quantizer.quantize(torch.zeros(8, device="cuda"), residual=torch.zeros(8))
