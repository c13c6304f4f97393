# SPDX-License-Identifier: Apache-2.0
"""Blockwise quantisation against the same formula in torch operations, eager and compiled, and a plain copy of the same bytes.

    python tests/bench/quantize.py --threads 2 [--device cuda] [--numel 16777216] [--compiled 1]

DeepSpeed 0.19.8 has no quantiser for the CPU (its accelerator there answers NotImplementedBuilder). Bytes: x in and codes and scales out, or
the other way round.
"""
import ctypes
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import torch  # noqa: E402
from op_race import Case, main  # noqa: E402

from deepspeed.ops import quantizer  # noqa: E402

GROUP = 256
FP8 = {"fp8_e4m3": (torch.float8_e4m3fn, 448.0), "fp8_e5m2": (torch.float8_e5m2, 57344.0)}


def torch_quantize(x, format, symmetric=True):
    """(codes uint8, scale[, zero]) as torch operations compute them; the layout of int4 is ours."""
    blocks = x.float().view(-1, GROUP)
    if format in FP8:
        dtype, largest = FP8[format]
        scale = (blocks.abs().amax(1, keepdim=True) / largest).clamp_min(2.0**-126)
        return (blocks * (1 / scale)).to(dtype).view(torch.uint8), scale
    bits = quantizer.FORMATS[format]
    if symmetric:
        scale = (blocks.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)).clamp_min(2.0**-126)
        codes, zero = torch.round(blocks * (1 / scale)).to(torch.int8).view(torch.uint8), ()
    else:
        low, high = blocks.aminmax(dim=1, keepdim=True)
        scale = ((high - low) / (2**bits - 1)).clamp_min(2.0**-126)
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
    """Codes differ nowhere, or where the last bit of a float32 product decides a tie: one in ten thousand at most, which would not hold for a wrong
    formula. (torch divides by the scale's own rounding in places.)"""
    different = (ours.view(-1) != theirs.reshape(-1)).double().mean().item()
    if different > 1e-4:
        raise AssertionError(f"{what}: {different:.2%} of the bytes differ from torch's")


def quantize_case(x, format, symmetric, peers):
    name = f"quantize {str(x.dtype)[6:]} -> {format}{'' if symmetric else ' asymmetric'}"
    q = quantizer.quantize(x, format, GROUP, symmetric)

    def check():
        want = torch_quantize(x, format, symmetric)
        same(q.data, want[0], name)
        torch.testing.assert_close(q.scale, want[1].view(-1), rtol=2.0**-23, atol=0)

    contenders = {"ours": lambda: quantizer.quantize(x, format, GROUP, symmetric)}
    contenders.update({peer: lambda body=body: body(torch_quantize)(x, format, symmetric) for peer, body in peers.items()})
    return Case(name, contenders, check, x.numel() * x.element_size() + q.nbytes, {peer: 1.0 for peer in peers})


def dequantize_case(x, format, symmetric, peers):
    name = f"dequantize {format}{'' if symmetric else ' asymmetric'} -> {str(x.dtype)[6:]}"
    q, parts = quantizer.quantize(x, format, GROUP, symmetric), torch_quantize(x, format, symmetric)

    def check():
        own = (q.data.view(parts[0].shape), q.scale.view(-1, 1), *([q.zero_point.view(-1, 1)] if not symmetric else []))
        want = torch_dequantize(own, format, x.dtype)
        if not torch.equal(quantizer.dequantize(q).view(-1), want.view(-1)):
            raise AssertionError(f"{name}: not torch's values")

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
        same(quantizer.dequantize_reduce_quantize(chunks)[0].data, composed(own)[0], name)

    contenders = {"ours": lambda: quantizer.dequantize_reduce_quantize(chunks)}
    contenders.update({peer: lambda body=body: body(composed)(parts) for peer, body in peers.items()})
    return Case(name, contenders, check, sum(c.nbytes for c in chunks) + chunks[0].nbytes, {peer: 1.0 for peer in peers})


def keep_pages():
    """glibc otherwise gives arrays above 32 MiB back to the kernel: every call of every contender would pay for fresh pages, the copy not."""
    m_trim_threshold, m_mmap_threshold = -1, -3
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(m_mmap_threshold, 1 << 30)
        libc.mallopt(m_trim_threshold, 2**31 - 1)


def alone_case(name, body, nbytes):
    return Case(name, {"ours": body}, lambda: None, nbytes)


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
        q = quantizer.quantize(x, format, GROUP)
        yield alone_case(f"quantize float32 -> {format}", lambda f=format: quantizer.quantize(x, f, GROUP), x.numel() * 4 + q.nbytes)
        yield alone_case(f"dequantize {format} -> float32", lambda q=q: quantizer.dequantize(q), x.numel() * 4 + q.nbytes)
    for format in ("int8", "int4", "fp8_e4m3"):
        q = quantizer.quantize(x, format, GROUP)
        yield alone_case(f"quantize float32 -> {format} stochastic", lambda f=format: quantizer.quantize(x, f, GROUP, stochastic=True, seed=1),
                         x.numel() * 4 + q.nbytes)
    yield alone_case("fake_quantize float32 int8", lambda: quantizer.fake_quantize(x, 8, GROUP), x.numel() * 8)


if __name__ == "__main__":
    keep_pages()
    main(__doc__, cases, numel=1 << 24, compiled=0)
