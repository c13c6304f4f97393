# SPDX-License-Identifier: Apache-2.0
"""Softmax of rows of 256 to 16384: forward and backward against torch eager, causal and masked against torch's composition.

    python tests/bench/softmax.py --threads 2 [--device cuda] [--only backward]

Two sizes: 2^20 elements, which caches hold, and 2^24, which they do not (on a GPU 2^27). Bars: forward no slower than torch, backward 1.5 times
as fast; on a GPU 0.9 of a large copy's rate, and 1.3 times as fast as torch.compile where that is far from it.
Bytes are those that must move: the input once in, the result once out (backward: two in, one out).
"""
import torch

import op_race
from op_race import with_compiled
from deepspeed.ops._library import ops
from deepspeed.ops.softmax import scaled_masked_softmax

COLUMNS = (256, 1024, 4096, 16384)
SIZES = {"cpu": {"cached": 2**20, "large": 2**24}, "cuda": {"large": 2**27}}


def bars(device, torch_bar):
    return {"torch": torch_bar} if device.type == "cpu" else {**op_race.SHARE_BAR, op_race.COMPILED: 1.3}


def plain(args, dtype, size, columns, device):
    """Forward and backward of softmax(x)."""
    x = torch.randn(size // columns, columns, device=device).to(dtype)
    y, grad = torch.softmax(x, -1), torch.randn(size // columns, columns, device=device).to(dtype)
    backward = ops().scaled_masked_softmax_backward

    def torch_backward(grad, y):
        return torch._softmax_backward_data(grad, y, -1, y.dtype)

    def check_forward():
        some = x[:64]
        op_race.assert_no_worse(scaled_masked_softmax(some), torch.softmax(some, -1), torch.softmax(some.double(), -1), "softmax")

    def check_backward():
        a, b = grad[:64], y[:64]
        exact = torch_backward(a.double(), b.double())
        op_race.assert_no_worse(backward(a, b, 1.0, False), torch_backward(a, b), exact, "softmax backward")

    ways = with_compiled(args, {"ours": lambda x: scaled_masked_softmax(x), "torch": lambda x: torch.softmax(x, -1)})
    yield "forward", {name: lambda f=f: f(x) for name, f in ways.items()}, check_forward, 2, bars(device, 1.0)
    contenders = {name: op_race.in_a_graph(f, [x]) for name, f in ways.items()}
    yield "backward", contenders, check_backward, 3, bars(device, 1.5), op_race.in_a_graph(op_race.identity, [x])
    ways = with_compiled(args, {"ours": lambda grad, y: backward(grad, y, 1.0, False), "torch": torch_backward})
    yield "held backward", {name: lambda f=f: f(grad, y) for name, f in ways.items()}, check_backward, 3, bars(device, 1.5)


def attention(args, dtype, size, keys, device):
    """Scores [batch, queries, keys] with scale: causal, and with a mask over the keys."""
    queries = min(keys, 1024, size // keys)
    x = torch.randn(size // (queries * keys), queries, keys, device=device).to(dtype)
    hidden = torch.ones(queries, keys, dtype=torch.bool, device=device).triu(1 + keys - queries)
    mask = torch.zeros(x.size(0), 1, keys, device=device, dtype=dtype).masked_fill(torch.rand(x.size(0), 1, keys, device=device) < 0.3, float("-inf"))

    def torch_causal(x):
        return torch.softmax((x * 0.125).masked_fill(hidden, float("-inf")), -1)

    def torch_masked(x):
        return torch.softmax(x * 0.125 + mask[:x.size(0)], -1)

    def check(f, peer):
        def run():
            some = x[:1]
            op_race.assert_no_worse(f(some), peer(some), peer(some.double()), "softmax of scores")
        return run

    def causal(x):
        return scaled_masked_softmax(x, scale=0.125, causal=True)

    def masked(x):
        return scaled_masked_softmax(x, mask[:x.size(0)], 0.125)

    for name, f, peer in (("causal", causal, torch_causal), ("masked", masked, torch_masked)):
        ways = with_compiled(args, {"ours": f, "torch": peer})
        yield name, {way: lambda g=g: g(x) for way, g in ways.items()}, check(f, peer), 2, bars(device, 1.0)


def cases(args):
    device = torch.device(args.device)
    for dtype in (torch.float32, torch.bfloat16):
        for size_name, size in SIZES[device.type].items():
            for columns in COLUMNS:
                for make in (plain, attention):
                    for name, contenders, check, arrays, *rest in make(args, dtype, size, columns, device):
                        moved = arrays * size * torch.finfo(dtype).bits // 8
                        yield op_race.Case(f"{name} {str(dtype)[6:]} {size_name} rows of {columns}", contenders, check, moved, *rest)


if __name__ == "__main__":
    op_race.main(__doc__, cases)
