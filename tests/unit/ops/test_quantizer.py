# SPDX-License-Identifier: Apache-2.0
"""Blockwise quantisation from Python: the same bits as torch where torch has the format, error bounds, reductions, compiled code, bad input."""
import dataclasses

import pytest
import torch

from deepspeed.ops import fp_quantizer, quantizer
from deepspeed.ops._library import ops
from deepspeed.ops.quantizer import FORMATS, QuantizedTensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KINDS = [(name, True) for name in FORMATS] + [("int8", False), ("int4", False)]
LARGEST = {"int8": 127, "int4": 7, "fp8_e4m3": 448, "fp8_e5m2": 57344, "fp6_e3m2": 28, "fp4_e2m1": 6, "fp12_e4m7": 510}
MANTISSA = {"fp8_e4m3": 3, "fp8_e5m2": 2, "fp6_e3m2": 2, "fp4_e2m1": 1, "fp12_e4m7": 7}


def step_bound(x, q):
    """The largest distance between neighbouring codes in each element's block, as wide as x: float formats double it towards the largest."""
    scale = q.scale.double().repeat_interleave(q.group_size)[:x.numel()].view(x.shape)
    if q.format in MANTISSA:   # the binade of the largest value
        return scale * 2.0 ** (torch.tensor(float(LARGEST[q.format])).log2().floor().item() - MANTISSA[q.format])
    return scale


@pytest.mark.parametrize("format, symmetric", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_error_is_at_most_half_a_step(format, symmetric, dtype):
    torch.manual_seed(0)
    x = (torch.randn(37, 101) * 3).to(dtype)
    q = quantizer.quantize(x, format, 64, symmetric)
    assert q.data.numel() == quantizer.data_nbytes(x.numel(), format, 64) and q.scale.numel() == -(-x.numel() // 64)
    back = quantizer.dequantize(q, torch.float32)
    # A few float32 roundings of values up to max|x|, and of scale times code.
    slack = 8 * 2.0**-24 * x.abs().max().item()
    assert ((back.double() - x.double()).abs() <= step_bound(x, q) / 2 + slack).all()
    rounded = quantizer.dequantize(q)
    assert rounded.dtype == dtype and rounded.shape == x.shape and torch.equal(rounded, back.to(dtype))


@pytest.mark.parametrize("format, torch_dtype", [("fp8_e4m3", torch.float8_e4m3fn), ("fp8_e5m2", torch.float8_e5m2)])
def test_fp8_has_the_bits_of_torch(format, torch_dtype):
    """Every bfloat16 up to the largest code, beside the largest in a block of two: the scale is 1. And every code read."""
    values = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16).float()
    values = values[values.abs() <= LARGEST[format]]
    pairs = torch.stack([torch.full_like(values, LARGEST[format]), values], 1)
    q = quantizer.quantize(pairs, format, 2)
    assert torch.equal(q.scale, torch.ones_like(q.scale))
    assert torch.equal(q.data.view(-1, 2)[:, 1], values.to(torch_dtype).view(torch.uint8))

    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    one = QuantizedTensor(codes, torch.ones(1), torch.empty(0), format, 256, (256,), torch.float32)
    torch.testing.assert_close(quantizer.dequantize(one), codes.view(torch_dtype).float(), rtol=0, atol=0, equal_nan=True)


def test_fp8_of_every_bfloat16_alone():
    values = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
    for format in ("fp8_e4m3", "fp8_e5m2"):
        back = quantizer.dequantize(quantizer.quantize(values, format, 1))
        finite = values.isfinite()
        # A block of one is its own largest: what comes back is it, to the roundings of the scale. Below the smallest scale it is any code.
        size = values.double().abs()[finite]
        half_a_step = size * 2.0 ** -(MANTISSA[format] + 1) + 2.0**-126 * 2.0**-10
        allowed = torch.where(size < LARGEST[format] * 2.0**-126, half_a_step, size * 2.0**-8)
        assert ((back.double() - values.double()).abs()[finite] <= allowed).all()
        assert back[~finite].isnan().all() and back[finite].isfinite().all()


@pytest.mark.parametrize("format, symmetric", KINDS)
def test_representable_values_come_back_exactly(format, symmetric):
    codes = torch.arange(-7, 8).float() if format.startswith("int") else torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6, -1, -6])
    top = LARGEST[format] if symmetric else {"int8": 255, "int4": 15}[format]
    x = torch.cat([codes, torch.tensor([float(top)])]) if symmetric else torch.arange(0, 16).float() * (top / 15) - 3
    x = x * 0.125
    assert torch.equal(quantizer.dequantize(quantizer.quantize(x, format, x.numel(), symmetric)), x)


def test_layout_by_hand():
    x = torch.tensor([7.0, -7, 3, 14, -2, 0, 7])
    assert quantizer.quantize(x, "int4", 3).data.tolist() == [0x97, 0x03, 0xf7, 0x00, 0x07]
    x = torch.tensor([28.0, -1, 0.0625, 0.5, 28])
    assert quantizer.quantize(x, "fp6_e3m2", 8).data.tolist() == [0x1f, 0x1b, 0x20, 0x1f]
    x = torch.tensor([510.0, -1, 2**-13])
    assert quantizer.quantize(x, "fp12_e4m7", 4).data.tolist() == [0xff, 0x07, 0xb8, 0x01, 0x00]


@pytest.mark.parametrize("format, symmetric", KINDS)
def test_blocks_that_are_not_finite_read_as_nan(format, symmetric):
    x = torch.zeros(4, 32)
    x[1, 5], x[2, 7] = float("inf"), float("nan")
    for back in (quantizer.dequantize(quantizer.quantize(x, format, 32, symmetric)),
                 quantizer.fake_quantize(x, format=format, group_size=32, symmetric=symmetric)):
        assert back[1:3].isnan().all() and torch.equal(back[[0, 3]], torch.zeros(2, 32))


@pytest.mark.parametrize("format, symmetric", KINDS)
def test_stochastic_rounding_is_reproducible_and_unbiased(format, symmetric):
    torch.manual_seed(1)
    x = torch.rand(256) * 2 - 1
    once = quantizer.quantize(x, format, 64, symmetric, stochastic=True, seed=5, offset=8)
    again = quantizer.quantize(x, format, 64, symmetric, stochastic=True, seed=5, offset=8)
    other = quantizer.quantize(x, format, 64, symmetric, stochastic=True, seed=6, offset=8)
    assert torch.equal(once.data, again.data) and not torch.equal(once.data, other.data)
    draws = 2000
    mean = torch.stack([quantizer.dequantize(quantizer.quantize(x, format, 64, symmetric, stochastic=True, seed=s)) for s in range(draws)])
    # Deviation of a draw: at most half a step; 256 means within six of theirs (a right generator fails once in a million).
    bound = 6 * step_bound(x, once) / 2 / draws**0.5 + 2.0**-20
    assert ((mean.double().mean(0) - x.double()).abs() <= bound).all()


def test_stochastic_rounding_without_a_seed_follows_torchs_generator():
    x = torch.randn(500)
    torch.manual_seed(3)
    first, second = (quantizer.quantize(x, "int4", stochastic=True).data for _ in range(2))
    torch.manual_seed(3)
    assert torch.equal(quantizer.quantize(x, "int4", stochastic=True).data, first) and not torch.equal(first, second)


@pytest.mark.parametrize("format, symmetric", KINDS)
def test_threads_change_no_bit(format, symmetric):
    torch.manual_seed(2)
    x = torch.randn(300_001)
    chunks = [quantizer.quantize(torch.randn(300_001), format, 96, symmetric) for _ in range(3)]
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            q = quantizer.quantize(x, format, 96, symmetric, stochastic=True, seed=1)
            again, total = quantizer.dequantize_reduce_quantize(chunks, dtype=torch.float32)
            results.append([q.data, q.scale, q.zero_point, quantizer.dequantize(q), again.data, again.scale, total])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize("format, symmetric", KINDS)
@pytest.mark.parametrize("mean", (False, True))
def test_reducing_is_dequantising_adding_and_quantising(format, symmetric, mean):
    torch.manual_seed(4)
    chunks = [quantizer.quantize(torch.randn(7, 133), format, 50, symmetric) for _ in range(4)]
    parts = [quantizer.dequantize(c) for c in chunks]
    want = ((parts[0] + parts[1]) + parts[2]) + parts[3]
    want = want * 0.25 if mean else want
    assert torch.equal(quantizer.dequantize_reduce(chunks, mean), want)
    assert torch.equal(quantizer.dequantize_reduce(chunks, mean, torch.bfloat16), want.bfloat16())
    for out_format, out_symmetric in ((None, None), ("int8", False)):
        again, total = quantizer.dequantize_reduce_quantize(chunks, mean, format=out_format, symmetric=out_symmetric, dtype=torch.float32)
        alone, nothing = quantizer.dequantize_reduce_quantize(chunks, mean, format=out_format, symmetric=out_symmetric)
        direct = quantizer.quantize(want, out_format or format, 50, symmetric if out_symmetric is None else out_symmetric)
        assert torch.equal(total, want) and nothing is None
        for name in ("data", "scale", "zero_point"):
            assert torch.equal(getattr(again, name), getattr(direct, name)) and torch.equal(getattr(alone, name), getattr(direct, name))


def test_slices_of_one_buffer_are_what_ranks_would_send():
    """Bytes of a slice that begins and ends at block borders are the slice quantised alone."""
    torch.manual_seed(5)
    ranks, numel, group = 4, 640, 32
    full = torch.randn(ranks * numel)
    for format, symmetric in KINDS:
        whole = quantizer.quantize(full, format, group, symmetric)
        for r in range(ranks):
            alone = quantizer.quantize(full[r * numel:(r + 1) * numel], format, group, symmetric)
            assert torch.equal(whole.data.view(ranks, -1)[r], alone.data) and torch.equal(whole.scale.view(ranks, -1)[r], alone.scale)


def test_error_feedback_keeps_what_was_lost():
    torch.manual_seed(6)
    residual, sent, wanted = torch.zeros(1000), torch.zeros(1000, dtype=torch.float64), torch.zeros(1000, dtype=torch.float64)
    for _ in range(20):
        x = torch.randn(1000)
        q = quantizer.quantize(x, "int4", 100, residual=residual)
        sent, wanted = sent + quantizer.dequantize(q).double(), wanted + x.double()
        # A step rounds twice, numbers below 8.
        torch.testing.assert_close(wanted - sent, residual.double(), rtol=0, atol=20 * 2 * 8 * 2.0**-24)


@pytest.mark.parametrize("dtype", DTYPES)
def test_fake_quantize_is_both_ways_and_straight_through(dtype):
    torch.manual_seed(7)
    x = torch.randn(5, 77).to(dtype).requires_grad_()
    for bits, symmetric in ((8, True), (8, False), (4, True), (4, False)):
        y = quantizer.fake_quantize(x, bits, 33, symmetric)
        assert torch.equal(y, quantizer.dequantize(quantizer.quantize(x.detach(), f"int{bits}", 33, symmetric)))
        grad = torch.randn_like(y)
        (got,) = torch.autograd.grad(y, x, grad)
        assert torch.equal(got, grad)
    assert torch.equal(quantizer.fake_quantize(x, format="fp6_e3m2"), quantizer.dequantize(quantizer.quantize(x.detach(), "fp6_e3m2")))


def test_other_layouts_and_empty_tensors():
    torch.manual_seed(8)
    x = torch.randn(40, 30)
    for view in (x.t(), x[::2, 1:], x[:1].expand(9, 30), torch.randn(())):
        q = quantizer.quantize(view, "int4", 16, False)
        assert torch.equal(q.data, quantizer.quantize(view.clone(memory_format=torch.contiguous_format), "int4", 16, False).data)
        assert quantizer.dequantize(q).shape == view.shape
        assert torch.equal(quantizer.fake_quantize(view, 4, 16, False), quantizer.dequantize(q))
    strided = dataclasses.replace(q, data=torch.stack([q.data, q.data], 1)[:, 0])
    assert torch.equal(quantizer.dequantize(strided), quantizer.dequantize(q))
    for format, symmetric in KINDS:
        q = quantizer.quantize(torch.empty(0, 5), format, 16, symmetric)
        assert q.data.numel() == q.scale.numel() == q.zero_point.numel() == 0 and quantizer.dequantize(q).shape == (0, 5)
        assert quantizer.dequantize_reduce([q, q]).shape == (0, 5) and quantizer.fake_quantize(torch.empty(0, 5)).shape == (0, 5)


# ---- torch.library and torch.compile --------------------------------------------------------------------------------

def operator_calls(device="cpu"):
    x = torch.randn(6, 50, device=device)
    for format, symmetric in (("int8", True), ("int4", False), ("fp6_e3m2", True)):
        q = quantizer.quantize(x, format, 16, symmetric)
        zero_points = [] if symmetric else [q.zero_point] * 2
        yield "quantize", (x, format, 16, symmetric)
        yield "quantize", (x.bfloat16(), format, 16, symmetric, True, 3, 4)
        yield "quantize_feedback", (x, torch.zeros_like(x), format, 16, symmetric)
        yield "dequantize", (q.data, q.scale, q.zero_point, [6, 50], format, 16, torch.bfloat16)
        yield "dequantize_reduce", ([q.data] * 2, [q.scale] * 2, zero_points, [6, 50], format, 16, 0.5, torch.float32)
        yield "dequantize_reduce", ([q.data] * 2, [q.scale] * 2, zero_points, [6, 50], format, 16, 0.5, None, "int8", False)
        yield "fake_quantize", (x.clone().requires_grad_(), format, 16, symmetric)


@pytest.mark.parametrize("number", range(21))
def test_opcheck(number):
    torch.manual_seed(9)
    name, arguments = list(operator_calls())[number]
    torch.library.opcheck(getattr(ops(), name).default, arguments)


@pytest.mark.parametrize("dynamic", (False, True))
def test_compiled_code_has_the_same_bits(dynamic):
    def both(x, residual):
        q = quantizer.quantize(x, "int4", 24, False, residual=residual)
        again, total = quantizer.dequantize_reduce_quantize([q, q], True, format="fp8_e4m3", dtype=torch.float32)
        return q.data, again.scale, total, quantizer.fake_quantize(x * 2, 8, 24)

    compiled = torch.compile(both, fullgraph=True, dynamic=dynamic)
    for n in (100, 131, 240):
        x, residual = torch.randn(n, requires_grad=True), torch.randn(n)
        residuals = [residual.clone(), residual.clone()]
        want, got = both(x, residuals[0]), compiled(x, residuals[1])
        assert all(torch.equal(a, b) for a, b in zip(want, got)) and torch.equal(*residuals)
        grads = [torch.autograd.grad(r[-1].sum(), x)[0] for r in (want, got)]
        assert torch.equal(*grads) and torch.equal(grads[0], torch.full((n,), 2.0))


# ---- what is refused -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("change, message", [
    (dict(format="int3"), "format must be one of int8, int4, fp8_e4m3"),
    (dict(group_size=0), "group_size must be at least 1 .*got 0"),
    (dict(group_size=2**60), "group_size must be .* at most 2.56, got"),
    (dict(format="fp8_e4m3", symmetric=False), "symmetric: only integer formats"),
    (dict(x=torch.zeros(4, dtype=torch.float64)), "x: dtype must be float32"),
    (dict(x=torch.zeros(4, dtype=torch.int8)), "x: dtype must be float32"),
    (dict(offset=3), "offset must be a multiple of 4"),
    (dict(offset=-4), "offset must be a multiple of 4"),
    (dict(residual=torch.zeros(5)), "residual has shape"),
    (dict(residual=torch.zeros(8, dtype=torch.bfloat16)), "residual must be float32"),
    (dict(residual=torch.zeros(16)[::2]), "residual must be contiguous"),
])
def test_quantize_refuses_by_name(change, message):
    arguments = dict(x=torch.zeros(8), format="int8", group_size=4)
    with pytest.raises(ValueError, match=message):
        quantizer.quantize(**{**arguments, **change})


def test_a_residual_that_is_x_is_refused():
    x = torch.zeros(8)
    with pytest.raises(ValueError, match="residual must not share memory with x"):
        quantizer.quantize(x, residual=x)


@pytest.mark.parametrize("change, message", [
    (dict(data=torch.zeros(7, dtype=torch.uint8)), "data has 7 bytes, 8 elements in groups of 4 have 8"),
    (dict(data=torch.zeros(8)), "data must be dense bytes"),
    (dict(scale=torch.ones(3)), "scale has 3 elements"),
    (dict(scale=torch.ones(2, dtype=torch.float16)), "scale must be a dense float32"),
    (dict(zero_point=torch.ones(1)), "zero_point has 1 elements"),
    (dict(format="fp8_e5m2", zero_point=torch.ones(2)), "zero_point: only integer formats"),
    (dict(shape=(-8,)), "shape: sizes must not be negative"),
    (dict(shape=(2**40, 2**40)), "too many elements"),
    (dict(dtype=torch.int32), "dtype must be float32"),
    (dict(group_size=0), "group_size must be at least 1"),
])
def test_dequantize_refuses_by_name(change, message):
    good = quantizer.quantize(torch.zeros(8), "int8", 4)
    with pytest.raises(ValueError, match=message):
        quantizer.dequantize(dataclasses.replace(good, **change))


def test_reduce_refuses_by_name():
    one = quantizer.quantize(torch.zeros(8), "int8", 4)
    with pytest.raises(ValueError, match="chunks: nothing"):
        quantizer.dequantize_reduce([])
    for name, arguments in (("format", (8, "int4", 4)), ("group_size", (8, "int8", 8)), ("shape", (9, "int8", 4)),
                            ("symmetric", (8, "int8", 4, False))):
        other = quantizer.quantize(torch.zeros(arguments[0]), *arguments[1:])
        with pytest.raises(ValueError, match=rf"chunks\[1\]: {name}"):
            quantizer.dequantize_reduce([one, other])
    with pytest.raises(ValueError, match="out_format must be one of"):
        quantizer.dequantize_reduce_quantize([one], format="int2")
    with pytest.raises(ValueError, match="out_symmetric: only integer"):
        quantizer.dequantize_reduce_quantize([one], format="fp4_e2m1", symmetric=False)
    with pytest.raises(ValueError, match="dtype and out_format are both absent"):
        ops().dequantize_reduce([one.data], [one.scale], [], [8], "int8", 4)
    with pytest.raises(ValueError, match="bits must be 8 or 4"):
        quantizer.fake_quantize(torch.zeros(8), 3)
    with pytest.raises(ValueError, match="format must be one of"):
        quantizer.data_nbytes(8, "int9", 4)


# ---- the names users know --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("q_bits, format", [(8, "fp8_e4m3"), (6, "fp6_e3m2"), (4, "fp4_e2m1"), (12, "fp12_e4m7")])
def test_fp_quantizer(q_bits, format):
    class Config:
        group_size = 64

    torch.manual_seed(10)
    x = torch.randn(32, 128).bfloat16()
    fp = fp_quantizer.FP_Quantize(Config())
    codes, scale = fp.quantize(x, q_bits=q_bits, return_meta_tensor=True)
    want = quantizer.quantize(x, format, 64)
    assert torch.equal(codes.view(-1), want.data) and codes.shape == (64, 64 * q_bits // 8) and torch.equal(scale, want.scale)
    back = fp.dequantize(codes, q_bits=q_bits)
    assert torch.equal(back, quantizer.dequantize(want)) and torch.equal(fp.get_scales(), scale)
    out = torch.empty(128, 32, dtype=torch.float32)
    assert fp.dequantize(codes, fp_out=out, q_bits=q_bits, scale=scale) is out
    assert torch.equal(out.view(-1), quantizer.dequantize(want, torch.float32).view(-1))
    picked = torch.tensor([3, 0, 31])
    assert torch.equal(fp.selective_dequantize(codes, picked, q_bits=q_bits), back[picked])
    odd = fp.quantize(x[:1, :100], q_bits=q_bits)
    assert odd.dim() == 1 and fp.dequantize(odd, q_bits=q_bits).shape == (1, 100)


@pytest.mark.parametrize("shape, group_size", [((2, 3), 4), ((2, 3), 6), ((4, 6), 4), ((3, 8), 4), ((6,), 4), ((4,), 1), ((3, 2, 5), 5), ((3, 5), 64),
                                               ((3, 0), 4), ((5, 7), 3)])
@pytest.mark.parametrize("q_bits", [4, 6, 8, 12])
def test_slices_are_those_of_the_whole(q_bits, shape, group_size):
    torch.manual_seed(12)
    fp = fp_quantizer.FP_Quantize(None)
    fp.group_size = group_size
    codes, scale = fp.quantize(torch.randn(shape) * 100, q_bits=q_bits, return_meta_tensor=True)
    whole = fp.dequantize(codes, q_bits=q_bits)
    for indexes in (torch.tensor([1]), torch.tensor([shape[0] - 1, 0, 0]), [0, -1], torch.tensor([], dtype=torch.long)):
        assert torch.equal(fp.selective_dequantize(codes, indexes, q_bits=q_bits, scale=scale), whole[indexes])
    out = torch.empty(1, *shape[1:], dtype=torch.bfloat16)
    assert fp.selective_dequantize(codes, [1], fp_out=out, q_bits=q_bits) is out and torch.equal(out, whole[[1]].bfloat16())
    if codes.numel():
        for bad, name in ((dict(input_q=codes.view(-1)[:-1], scale=scale), "data has"), (dict(input_q=codes, scale=scale[:-1]), "scale has")):
            with pytest.raises(ValueError, match=name):
                fp.selective_dequantize(indexes=[0], q_bits=q_bits, **bad)


def test_slices_of_groups_that_straddle():
    fp = fp_quantizer.FP_Quantize(None)
    fp.group_size = 4
    codes = fp.quantize(torch.tensor([[1.0, 2.0, 3.0], [400.0, 5.0, 6.0]]))
    assert torch.equal(fp.selective_dequantize(codes, torch.tensor([1]))[0], fp.dequantize(codes)[1])
    fp.quantize(torch.tensor(1.0))
    with pytest.raises(ValueError, match="no slices"):
        fp.selective_dequantize(codes, [0])


def test_fp_quantizer_choices():
    plain = fp_quantizer.Quantizer()
    assert plain.group_size == 512
    x = torch.randn(512)
    assert torch.equal(plain.quantize(x, q_mantisa_bits=2).view(-1), quantizer.quantize(x, "fp8_e5m2", 512).data)
    torch.manual_seed(1)
    first = plain.quantize(x, stochastic_mode=True)
    torch.manual_seed(1)
    assert torch.equal(plain.quantize(x, stochastic_mode=True), first)
    for bad, name in ((dict(q_bits=7), "q_bits"), (dict(q_mantisa_bits=4), "q_mantisa_bits")):
        with pytest.raises(ValueError, match=name):
            plain.quantize(x, **bad)
    with pytest.raises(ValueError, match="group_size"):
        fp_quantizer.Quantizer(0)
    with pytest.raises(ValueError, match="scale"):
        fp_quantizer.Quantizer().dequantize(first)


def test_matmul_fp8():
    torch.manual_seed(11)
    weight, inp = torch.randn(64, 32).bfloat16(), torch.randn(3, 64).bfloat16()
    q = fp_quantizer.Quantizer(group_size=32)
    codes, scale = q.quantize(weight, return_meta_tensor=True)
    assert torch.equal(fp_quantizer.matmul_fp8(inp, codes, scale, 32, q), inp @ q.dequantize(codes))
    with pytest.raises(ValueError, match="quantization_group_size"):
        fp_quantizer.matmul_fp8(inp, codes, scale, 64, q)


def test_a_seed_comes_from_the_cpu_generator_whatever_the_default_device():
    x = torch.linspace(-1, 1, 100)
    torch.manual_seed(3)
    plain = quantizer.quantize(x, stochastic=True)
    torch.manual_seed(3)
    with torch.device("meta"):
        assert torch.equal(quantizer.quantize(x, stochastic=True).data, plain.data)
