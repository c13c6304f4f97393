# SPDX-License-Identifier: Apache-2.0
"""Blockwise quantisation against the same formula in torch operations, eager and compiled, and a plain copy of the same bytes.

    python tests/bench/quantize.py --threads 2 [--device cuda] [--numel 16777216] [--compiled]

DeepSpeed 0.19.8 has no quantiser for the CPU (its accelerator there answers NotImplementedBuilder). Bytes: x in and codes and scales out, or
the other way round.
"""
import torch
from op_race import Case, main

from deepspeed.ops import quantizer

GROUP = 256
LARGEST = {"int8": 127.0, "int4": 7.0, "fp8_e4m3": 448.0, "fp8_e5m2": 57344.0, "fp6_e3m2": 28.0, "fp4_e2m1": 6.0, "fp12_e4m7": 510.0}
MANTISSA = {"fp8_e4m3": (3, -6), "fp8_e5m2": (2, -14), "fp6_e3m2": (2, -2), "fp4_e2m1": (1, 0), "fp12_e4m7": (7, -6)}  # bits, lowest exponent
FP8 = {"fp8_e4m3": (torch.float8_e4m3fn, 448.0), "fp8_e5m2": (torch.float8_e5m2, 57344.0)}


def divided(range, largest):
    """The scale. By a tensor: torch on a GPU takes a number's reciprocal, which is rounded, instead."""
    return (range / torch.full((), largest, device=range.device)).clamp_min(2.0**-126)


def torch_quantize(x, format, symmetric=True):
    """(codes uint8, scale[, zero]) as torch operations compute them; the layout of int4 is ours."""
    blocks = x.float().view(-1, GROUP)
    if format in FP8:
        dtype, largest = FP8[format]
        scale = divided(blocks.abs().amax(1, keepdim=True), largest)
        return (blocks * (1 / scale)).to(dtype).view(torch.uint8), scale
    bits = quantizer.FORMATS[format]
    if symmetric:
        scale = divided(blocks.abs().amax(1, keepdim=True), LARGEST[format])
        codes, zero = torch.round(blocks * (1 / scale)).to(torch.int8).view(torch.uint8), ()
    else:
        low, high = blocks.aminmax(dim=1, keepdim=True)
        scale = divided(high - low, 2.0**bits - 1)
        codes, zero = torch.round((blocks - low) * (1 / scale)).to(torch.uint8), (low,)
    if bits == 4:
        codes = codes[:, 0::2] & 15 | codes[:, 1::2] << 4
    return (codes, scale, *zero)


def torch_dequantize(parts, format, dtype):
    codes, scale, *zero = parts
    if format in FP8:
        return (codes.view(FP8[format][0]).float() * scale).to(dtype)
    if format == "int4":
        codes = torch.stack([codes & 15, codes >> 4], 2).view(codes.shape[0], GROUP)
        if not zero:
            codes = (codes ^ 8).to(torch.int8) - 8
    elif not zero:
        codes = codes.view(torch.int8)
    values = codes.float() * scale
    return (values + zero[0] if zero else values).to(dtype)


def same(ours, theirs, what):
    """To the bit: both are the same float32 operations, each rounded once."""
    different = (ours.view(-1) != theirs.reshape(-1)).sum().item()
    if different:
        raise AssertionError(f"{what}: {different} of {ours.numel()} differ from torch's")


def step_sizes(x, q):
    """Of every element, the distance between the two codes around it, in float64: the scale or, of a floating-point format, 2^(e - mantissa bits)
    scales with e the value's exponent, at least that of the format's smallest normal number."""
    scale = q.scale.double().repeat_interleave(GROUP)
    if q.format not in MANTISSA:
        return scale
    mantissa, lowest = MANTISSA[q.format]
    exponent = torch.frexp(x.double().view(-1) / scale)[1] - 1
    return scale * torch.exp2(exponent.clamp_min(lowest).double() - mantissa)


def check_round_trip(x, q, what, stochastic=False):
    """The scales are the formula's; values come back within half a step (stochastic: a step, and right on average: the mean error of n of them, whose
    variance is at most step^2 / 4, is within six of its standard deviations), and the four float32 roundings of scale, reciprocal, product and value."""
    same(q.scale, divided(x.view(-1, GROUP).abs().amax(1), LARGEST[q.format]), f"{what}: scales")
    exact, step = x.double().view(-1), step_sizes(x, q)
    error = quantizer.dequantize(q, torch.float32).double().view(-1) - exact
    beyond = (error.abs() > step * (1.0 if stochastic else 0.5) + exact.abs() * 4 * 2.0**-24).sum().item()
    if beyond:
        raise AssertionError(f"{what}: {beyond} of {x.numel()} values come back further off than rounding takes them")
    if stochastic and not error.sum().abs() <= 6 * (step.square().sum() / 4).sqrt() + exact.abs().sum() * 4 * 2.0**-24:
        raise AssertionError(f"{what}: the mean error is {error.mean():.3g}")


def quantize_case(x, format, symmetric, peers):
    name = f"quantize {str(x.dtype)[6:]} -> {format}{'' if symmetric else ' asymmetric'}"
    q = quantizer.quantize(x, format, GROUP, symmetric)

    def check():
        want = torch_quantize(x, format, symmetric)
        for mine, other, what in zip((q.data, q.scale, q.zero_point), want, ("codes", "scales", "zero points")):
            same(mine, other, f"{name}: {what}")

    contenders = {"ours": lambda: quantizer.quantize(x, format, GROUP, symmetric)}
    contenders.update({peer: lambda body=body: body(torch_quantize)(x, format, symmetric) for peer, body in peers.items()})
    return Case(name, contenders, check, x.numel() * x.element_size() + q.nbytes, {peer: 1.0 for peer in peers})


def dequantize_case(x, format, symmetric, peers):
    name = f"dequantize {format}{'' if symmetric else ' asymmetric'} -> {str(x.dtype)[6:]}"
    q, parts = quantizer.quantize(x, format, GROUP, symmetric), torch_quantize(x, format, symmetric)

    def check():
        own = (q.data.view(parts[0].shape), q.scale.view(-1, 1), *([q.zero_point.view(-1, 1)] if not symmetric else []))
        want = torch_dequantize(own, format, x.dtype)
        same(quantizer.dequantize(q), want, name)

    contenders = {"ours": lambda: quantizer.dequantize(q)}
    contenders.update({peer: lambda body=body: body(torch_dequantize)(parts, format, x.dtype) for peer, body in peers.items()})
    return Case(name, contenders, check, x.numel() * x.element_size() + q.nbytes, {peer: 1.0 for peer in peers})


def reduce_case(x, format, peers, ranks=4):
    name = f"reduce {ranks} x {format} -> {format}"
    chunks = [quantizer.quantize(x * (r + 1), format, GROUP) for r in range(ranks)]
    parts = [torch_quantize(x * (r + 1), format) for r in range(ranks)]

    def composed(quantized):
        total = torch_dequantize(quantized[0], format, torch.float32)
        for other in quantized[1:]:
            total = total + torch_dequantize(other, format, torch.float32)
        return torch_quantize(total, format)

    def check():
        own = [(c.data.view(parts[0][0].shape), c.scale.view(-1, 1)) for c in chunks]
        result, want = quantizer.dequantize_reduce_quantize(chunks)[0], composed(own)
        same(result.data, want[0], f"{name}: codes")
        same(result.scale, want[1], f"{name}: scales")

    contenders = {"ours": lambda: quantizer.dequantize_reduce_quantize(chunks)}
    contenders.update({peer: lambda body=body: body(composed)(parts) for peer, body in peers.items()})
    return Case(name, contenders, check, sum(c.nbytes for c in chunks) + chunks[0].nbytes, {peer: 1.0 for peer in peers})


def alone_cases(x, format, stochastic=False):
    """Both ways of what torch has no operations for."""
    def quantize():
        return quantizer.quantize(x, format, GROUP, stochastic=stochastic, seed=1)

    q, kind = quantize(), " stochastic" if stochastic else ""
    moved = x.numel() * x.element_size() + q.nbytes
    yield Case(f"quantize float32 -> {format}{kind}", {"ours": quantize}, lambda: check_round_trip(x, quantize(), format, stochastic), moved)
    if not stochastic:
        yield Case(f"dequantize {format} -> float32", {"ours": lambda: quantizer.dequantize(q)}, lambda: check_round_trip(x, q, format), moved)


def fake_case(x):
    def check():
        same(quantizer.fake_quantize(x, 8, GROUP), torch_dequantize(torch_quantize(x, "int8"), "int8", x.dtype), "fake_quantize")

    return Case("fake_quantize float32 int8", {"ours": lambda: quantizer.fake_quantize(x, 8, GROUP)}, check, 2 * x.numel() * x.element_size())


def cases(args):
    peers = {"torch": lambda f: f}
    if args.compiled:
        compiled = {}
        peers["torch.compile"] = lambda f: compiled.setdefault(f, torch.compile(f, dynamic=False))
    n = args.numel // GROUP * GROUP
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(n, device=args.device).to(dtype)
        for format, symmetric in (("int8", True), ("int8", False), ("int4", True), ("int4", False), ("fp8_e4m3", True), ("fp8_e5m2", True)):
            yield quantize_case(x, format, symmetric, peers)
            yield dequantize_case(x, format, symmetric, peers)
    x = torch.randn(n // 4, device=args.device)
    for format in ("int8", "int4", "fp8_e4m3"):
        yield reduce_case(x, format, peers)
    x = torch.randn(n, device=args.device)
    for format in ("fp6_e3m2", "fp4_e2m1", "fp12_e4m7"):  # formats torch has not
        yield from alone_cases(x, format)
    for format in ("int8", "int4", "fp8_e4m3"):
        yield from alone_cases(x, format, stochastic=True)
    yield fake_case(x)


if __name__ == "__main__":
    main(__doc__, cases, numel=1 << 24)
