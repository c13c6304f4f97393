# SPDX-License-Identifier: Apache-2.0
"""The models that are timed, in plain torch. Weights are drawn only by the constructors of torch's own layers, so that building
under `zero.Init`, which partitions each layer as soon as it exists, draws the same numbers as building plainly."""
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

SEED = 20


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.heads = width // 64
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x):
        b, t, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, self.heads, 64).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(b, t, d))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Gpt(nn.Module):
    """Byte-level GPT. forward(tokens [batch, length + 1] int64) -> mean cross entropy of the next byte, in nats."""

    vocab, context = 256, 1024

    def __init__(self, width, layers):
        super().__init__()
        self.embed = nn.Embedding(self.vocab, width)
        self.position = nn.Embedding(self.context, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, self.vocab, bias=False)

    def forward(self, tokens):
        x = self.embed(tokens[:, :-1])
        x = x + self.position(torch.arange(x.shape[1], device=x.device))
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32)), tokens[:, 1:].flatten())

    def units(self):
        """What FSDP2 shards as one group, besides the root."""
        return list(self.blocks)


class Scale(nn.Module):
    # All links get about the same gradient, so what one unit in the last place of a weight does to the output is multiplied by the
    # number of links; the small factor keeps that below the tolerance, while every link still saves its weight for backward.
    factor = 2.0**-8

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width))

    def forward(self, x):
        return torch.addcmul(x, x, self.weight, value=self.factor)


class Chain(nn.Module):
    """1024 modules of one 64-element parameter each, one after the other: nothing but the library's overhead."""

    modules_count, width = 1024, 64

    def __init__(self):
        super().__init__()
        self.links = nn.ModuleList(Scale(self.width) for _ in range(self.modules_count))

    def forward(self, x, y):
        for link in self.links:
            x = link(x)
        return (x - y).float().square().mean()

    def units(self):
        return list(self.links)


class Model(NamedTuple):
    name: str
    build: object
    unit_numel: int  # the largest unit, in elements: one block, or one module of the chain
    layers: int
    width: int

    def batch(self, step, micro, rank, batch, tokens):
        """The arguments of forward for one micro-batch of one rank, the same in every process."""
        generator = torch.Generator().manual_seed((step * 1009 + micro) * 1009 + rank)
        if self.layers:
            # Half the entropy of uniform bytes, so that there is something to learn.
            return (torch.randint(16, (batch, tokens + 1), generator=generator) * 7,)
        return torch.randn(self.width, generator=generator), torch.randn(self.width, generator=generator)

    def flops(self, numel, batch, tokens):
        """Multiply-adds counted as 2, forward and backward, without the attention scores' causal half that is skipped."""
        dense = 6 * numel * batch * tokens
        return dense + 6 * self.layers * batch * tokens * tokens * self.width


def _gpt(name, width, layers):
    return Model(name, lambda: Gpt(width, layers), 12 * width * width + 10 * width, layers, width)


MODELS = {
    model.name: model
    for model in (
        _gpt("gpt-2m", 128, 4),  # for trying the scripts out
        _gpt("gpt-25m", 512, 8),
        _gpt("gpt-135m", 768, 19),
        _gpt("gpt-300m", 1024, 24),
        Model("tiny1024", Chain, Chain.width, 0, Chain.width),
    )
}


def build(name):
    """The module with the weights every process agrees on. Call under `zero.Init` to build it sharded."""
    torch.manual_seed(SEED)
    return MODELS[name].build()
