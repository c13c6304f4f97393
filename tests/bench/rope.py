# SPDX-License-Identifier: Apache-2.0
"""Rotary embedding of q and k (deepspeed.ops.rope) against torch eager's composition, as models write it, forward and backward.

    python tests/bench/rope.py --threads 2
    python tests/bench/rope.py --device cuda
"""
import torch

import op_race
from deepspeed.ops.rope import apply_rotary

BARS = {"cpu": {"torch": 1.0}, "cuda": {**op_race.SHARE_BAR, op_race.COMPILED: 1.3}}


def rotate_half(x):
    a, b = x.chunk(2, -1)
    return torch.cat([-b, a], -1)


def plain_half(q, k, cos, sin):
    return tuple(x * cos + rotate_half(x) * sin for x in (q, k))


def plain_interleaved(q, k, cos, sin):
    return tuple(x * cos + torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2) * sin for x in (q, k))


def cases(args):
    device = torch.device(args.device)
    batch, seq = (8, 4096) if device.type == "cuda" else (1, 2048)
    for dtype in (torch.float32, torch.bfloat16):
        for layout in ("bshd", "bhsd"):
            for style in ("half", "interleaved"):
                yield from race(args, device, dtype, layout, style, batch, seq)


def race(args, device, dtype, layout, style, batch, seq):
    def heads(count):  # as a projection leaves them: [batch, seq, heads, dim] in memory
        x = torch.randn(batch, seq, count, args.dim, device=device).to(dtype)
        return x if layout == "bshd" else x.transpose(1, 2)

    q, k, q_grad, k_grad = heads(args.q_heads), heads(args.k_heads), heads(args.q_heads), heads(args.k_heads)
    angles = torch.outer(torch.arange(seq, dtype=torch.float64), 10000.0 ** (-torch.arange(0, args.dim, 2, dtype=torch.float64) / args.dim))
    cos, sin = angles.cos().float().to(device), angles.sin().float().to(device)
    angles = torch.cat([angles, angles], -1) if style == "half" else angles.repeat_interleave(2, -1)
    plain = plain_half if style == "half" else plain_interleaved

    def wide(dtype):
        shape = (seq, 1, args.dim) if layout == "bshd" else (seq, args.dim)
        return angles.cos().view(shape).to(device, dtype), angles.sin().view(shape).to(device, dtype)

    def ours(q, k):
        return apply_rotary(q, k, cos, sin, layout=layout, style=style)

    tables = wide(dtype)

    def torch_eager(q, k):
        return plain(q, k, *tables)

    def graph(function):
        def make():
            leaves = [q.detach().requires_grad_(), k.detach().requires_grad_()]
            out = function(*leaves)
            return lambda: torch.autograd.grad(out, leaves, [q_grad, k_grad], retain_graph=True)
        return op_race.later(make)

    def check():
        exact_tables = wide(torch.float64)
        leaves = [q.double().requires_grad_(), k.double().requires_grad_()]
        exact = plain(*leaves, *exact_tables)
        exact = [*exact, *torch.autograd.grad(exact, leaves, [q_grad.double(), k_grad.double()])]
        for index, (a, b, c) in enumerate(zip([*ours(q, k), *graph(ours)()], [*torch_eager(q, k), *graph(torch_eager)()], exact, strict=True)):
            op_race.assert_no_worse(a, b, c, f"result {index}")

    moved = 2 * (q.nbytes + k.nbytes)
    name = f"{str(dtype).removeprefix('torch.')} {layout} {style}"
    ways = op_race.with_compiled(args, {"ours": ours, "torch": torch_eager})
    yield op_race.Case(f"{name} forward", {way: lambda f=f: f(q, k) for way, f in ways.items()}, check, moved, BARS[device.type])
    yield op_race.Case(f"{name} backward", {way: graph(f) for way, f in ways.items()}, check, moved, BARS[device.type])


if __name__ == "__main__":
    op_race.main(__doc__, cases, q_heads=32, k_heads=8, dim=128)
