# SPDX-License-Identifier: Apache-2.0
"""Small models, each with one property that breaks a careless ZeRO, and the data the ranks feed them.

A case is a recipe: `build()` gives the same initial weights on every rank and in every process, `batch(step, micro, rank)`
the same inputs wherever it is asked. `forward` of every model returns the scalar loss. Sizes are chosen not to divide
by 2, 3 or 4, so that every partition has padding.
"""
from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        # No bias: softmax does not see the keys' bias, so its gradient is pure rounding noise, which Adam would blow up to steps
        # of size lr; parameters could then be compared at no useful tolerance.
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x):
        b, t, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        # Written out: the fused attention kernels have no float64 path on every device, and the oracle runs in float64.
        scores = (q @ k.transpose(-1, -2)) * (d // self.heads) ** -0.5
        mask = torch.ones(t, t, dtype=torch.bool, device=x.device).tril()
        y = scores.masked_fill(~mask, float("-inf")).softmax(-1) @ v
        x = x + self.out(y.transpose(1, 2).reshape(b, t, d))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class SmallGpt(nn.Module):
    """Byte-like GPT of width 21 and odd vocabulary 61."""

    vocab, context = 61, 11

    def __init__(self, tied=False, width=21, layers=2):
        super().__init__()
        self.embed = nn.Embedding(self.vocab, width)
        self.position = nn.Embedding(self.context, width)
        self.blocks = nn.ModuleList(Block(width, 3) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, self.vocab, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens):
        x = self.embed(tokens[:, :-1])
        x = x + self.position(torch.arange(x.shape[1], device=x.device))
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32)), tokens[:, 1:].flatten())


class OddSizes(nn.Module):
    """Parameters of 91, 13, 65, 5, 5 and 1 elements: all below or beside any alignment."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(7, 13), nn.Linear(13, 5), nn.Linear(5, 1)

    def body(self, x):
        return self.third(torch.tanh(self.second(torch.tanh(self.first(x)))))

    def forward(self, x):
        return (self.body(x) - x.sum(-1, keepdim=True)).square().mean()


class ZeroDim(OddSizes):
    """Two 0-dim parameters, one of them the very first of the module."""

    def __init__(self):
        nn.Module.__init__(self)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.first, self.second, self.third = nn.Linear(7, 13), nn.Linear(13, 5), nn.Linear(5, 1)
        self.shift = nn.Parameter(torch.tensor(-0.25))

    def body(self, x):
        return self.scale * super().body(x) + self.shift


class MixedDtype(OddSizes):
    """The middle layer is bfloat16, the others float32; casts are written in forward, as users do."""

    def __init__(self):
        super().__init__()
        self.second.to(torch.bfloat16)

    def body(self, x):
        y = torch.tanh(self.first(x))
        y = self.second(y.to(self.second.weight.dtype))
        return self.third(torch.tanh(y.to(self.third.weight.dtype)))


class Frozen(OddSizes):
    """A frozen layer between trained ones, a frozen bias in a trained layer."""

    def __init__(self):
        super().__init__()
        self.second.requires_grad_(False)
        self.third.bias.requires_grad_(False)


class Unused(OddSizes):
    """`never` has no gradient anywhere; `sometimes` only where the batch says so (other ranks, other steps: none)."""

    def __init__(self):
        super().__init__()
        self.never = nn.Linear(5, 3)
        self.sometimes = nn.Linear(7, 1)

    def forward(self, x, use):
        y = self.body(x)
        if use:
            y = y + self.sometimes(x)
        return (y - x.sum(-1, keepdim=True)).square().mean()


class Routed(nn.Module):
    """Three experts; a batch goes through one of them, chosen by the batch, so ranks take different branches."""

    def __init__(self):
        super().__init__()
        self.inward = nn.Linear(7, 9)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(9, 11), nn.Tanh(), nn.Linear(11, 9)) for _ in range(3))
        self.outward = nn.Linear(9, 1)

    def forward(self, x, expert):
        y = self.outward(self.experts[expert](torch.tanh(self.inward(x))))
        return (y - x.sum(-1, keepdim=True)).square().mean()


class Case(NamedTuple):
    name: str
    model: Callable[[], nn.Module]
    inputs: Callable  # (generator, step, micro, rank) -> the arguments of forward

    def build(self):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(20)
            return self.model()

    def batch(self, step, micro, rank):
        seed = (step * 1009 + micro) * 1009 + rank
        return self.inputs(torch.Generator().manual_seed(seed), step, micro, rank)


def _tokens(generator, step, micro, rank):
    return (torch.randint(SmallGpt.vocab, (2, SmallGpt.context + 1), generator=generator),)


def _vectors(generator, step, micro, rank):
    return (torch.randn(4, 7, generator=generator),)


def _vectors_and_use(generator, step, micro, rank):
    return torch.randn(4, 7, generator=generator), (step + rank) % 3 == 0


def _vectors_and_expert(generator, step, micro, rank):
    return torch.randn(4, 7, generator=generator), (step + micro + rank) % 3


def _tied_gpt():
    return SmallGpt(tied=True)


CASES = {
    case.name: case
    for case in (
        Case("gpt", SmallGpt, _tokens),
        Case("tied", _tied_gpt, _tokens),
        Case("odd", OddSizes, _vectors),
        Case("zero_dim", ZeroDim, _vectors),
        Case("mixed_dtype", MixedDtype, _vectors),
        Case("frozen", Frozen, _vectors),
        Case("unused", Unused, _vectors_and_use),
        Case("routed", Routed, _vectors_and_expert),
    )
}
