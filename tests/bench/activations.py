# SPDX-License-Identifier: Apache-2.0
"""The fused activations of deepspeed.ops.activations against torch eager's composition, forward and backward.

No contender may be timed before its results have been held against float64. The bytes are those that any implementation must move: each
input once in, each output once out. The bar is torch's own time: 1.0.

    python tests/bench/activations.py --threads 2
    python tests/bench/activations.py --device cuda
"""
import torch
from torch.nn import functional as F

import op_race
from deepspeed.ops import activations
from deepspeed.ops._library import ops

BARS = {"cpu": {"torch": 1.0}, "cuda": {**op_race.SHARE_BAR, op_race.COMPILED: 1.3}}


def check(ours, plain, leaves, grad):
    """Forward and backward on the first rows."""
    rows = [t if t.dim() == 1 else t[:64] for t in leaves]
    grad = grad[:64]

    def results(function, tensors, grad):
        tensors = [t.detach().clone().requires_grad_() for t in tensors]
        out = function(*tensors)
        return [out, *torch.autograd.grad(out, tensors, grad)]

    exact = results(plain, [t.double() for t in rows], grad.double())
    for index, (a, b, c) in enumerate(zip(results(ours, rows, grad), results(plain, rows, grad), exact, strict=True)):
        op_race.assert_no_worse(a, b, c, f"result {index}")


def race(args, name, ours, plain, leaves, grad):
    """The forward and the backward case of one function."""
    def checked():
        check(ours, plain, leaves, grad)
    moved = sum(t.nbytes for t in leaves)
    ways, bars = op_race.with_compiled(args, {"ours": ours, "torch": plain}), BARS[grad.device.type]
    yield op_race.Case(f"{name} forward", {way: lambda f=f: f(*leaves) for way, f in ways.items()}, checked, moved + grad.nbytes, bars)
    # The smallest traffic: the inputs again, the gradient in, the inputs' gradients out.
    yield op_race.Case(f"{name} backward", {way: op_race.in_a_graph(f, leaves) for way, f in ways.items()}, checked, 2 * moved + grad.nbytes, bars,
                       op_race.in_a_graph(op_race.identity, [grad]))


def dropout_race(args, name, x, residual, bias):
    p = 0.1

    def ours(x, residual, bias):
        return activations.dropout_add(x, residual, p, bias=bias)

    def plain(x, residual, bias):
        return residual + F.dropout(x + bias, p)

    def checked():
        """With the mask taken from the operator itself."""
        state = torch.tensor([11, 4], device=x.device)
        mask = ops().dropout_add(torch.ones_like(x[:64]), torch.zeros_like(x[:64]), None, p, state) != 0
        assert abs(mask.double().mean().item() - (1 - p)) < 0.01
        check(lambda x, r, b: ops().dropout_add(x, r, b, p, state),
              lambda x, r, b: r + (x + b) * (mask / (1 - p)).to(x.dtype), [x, residual, bias], residual)

    leaves = [x, residual, bias]
    ways, bars = op_race.with_compiled(args, {"ours": ours, "torch": plain}), BARS[x.device.type]
    yield op_race.Case(f"{name} forward", {way: lambda f=f: f(*leaves) for way, f in ways.items()}, checked, 3 * x.nbytes, bars)
    yield op_race.Case(f"{name} backward", {way: op_race.in_a_graph(f, leaves) for way, f in ways.items()}, checked, 2 * x.nbytes, bars,
                       op_race.in_a_graph(op_race.identity, [x]))


def cases(args):
    device = torch.device(args.device)
    rows = 32768 if device.type == "cuda" else 1024  # more than a GPU's caches hold
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")

        def tensor(*shape):
            return torch.randn(shape, device=device).to(dtype)

        x, grad, bias = tensor(rows, args.columns), tensor(rows, args.columns), tensor(args.columns)
        for act, fused, plain in (("gelu", activations.bias_gelu, F.gelu),
                                  ("gelu tanh", lambda x, b=None: activations.bias_gelu(x, b, "tanh"), lambda x: F.gelu(x, approximate="tanh")),
                                  ("silu", activations.bias_silu, F.silu), ("relu", activations.bias_relu, F.relu)):
            yield from race(args, f"{name} bias+{act}", fused, lambda x, b, plain=plain: plain(x + b), [x, bias], grad)
            yield from race(args, f"{name} {act}", fused, plain, [x], grad)
        for act, fused, plain in (("swiglu", activations.swiglu, F.silu), ("geglu", activations.geglu, F.gelu)):
            yield from race(args, f"{name} {act}", fused, lambda g, u, plain=plain: plain(g) * u, [x, tensor(rows, args.columns)], grad)
            yield from race(args, f"{name} {act} of halves", fused, lambda x, plain=plain: plain(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1],
                            [tensor(rows, 2 * args.columns)], grad)
        yield from dropout_race(args, f"{name} dropout+residual+bias", x, tensor(rows, args.columns), bias)


if __name__ == "__main__":
    op_race.main(__doc__, cases, columns=4096)
