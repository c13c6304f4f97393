# SPDX-License-Identifier: Apache-2.0
"""Activation checkpointing recomputes inside backward: gathering and reducing must not notice."""
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.parity.cases import CASES, Block, Case, SmallGpt
from tests.parity.launch import run
from tests.parity.reference_loop import close, reference_loop
from tests.parity.training import STAGES, assert_same_bits, train, transport


def plainly(function, *args):
    return function(*args)


def reentrant(function, *args):
    return checkpoint(function, *args, use_reentrant=True)


def non_reentrant(function, *args):
    return checkpoint(function, *args, use_reentrant=False)


def own(function, *args):
    from deepspeed.checkpointing import checkpoint as own_checkpoint
    return own_checkpoint(function, *args)


def own_non_reentrant(function, *args):
    from deepspeed.checkpointing import non_reentrant_checkpoint
    return non_reentrant_checkpoint(function, *args)


WAYS = {f.__name__: f for f in (plainly, reentrant, non_reentrant, own, own_non_reentrant)}


class InnerBlock(Block):
    """Checkpoints its two halves, called as functions of the block."""

    way = "plainly"

    def attention(self, x):
        b, t, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        return self.out((q @ k.transpose(-1, -2)).softmax(-1).matmul(v).transpose(1, 2).reshape(b, t, d))

    def mlp(self, x):
        return self.down(torch.tanh(self.up(self.norm2(x))))

    def forward(self, x):
        x = x + WAYS[self.way](self.attention, x)
        return x + WAYS[self.way](self.mlp, x)


class CheckpointedGpt(SmallGpt):
    """way: how blocks are checkpointed; over or inside them. frozen: which parts are not trained."""

    def __init__(self, way, inside, frozen, tied):
        super().__init__(tied=tied)
        self.way, self.inside = way, inside
        self.blocks = nn.ModuleList((InnerBlock if inside else Block)(21, 3) for _ in range(3))
        if inside:
            for block in self.blocks:
                block.way = way
        if frozen == "first":  # a checkpointed block whose input needs no gradient
            self.embed.requires_grad_(False)
            self.position.requires_grad_(False)
            self.blocks[0].requires_grad_(False)
        elif frozen == "between":
            self.blocks[1].requires_grad_(False)
            self.blocks[2].up.requires_grad_(False)
        elif frozen == "embeddings":
            self.embed.requires_grad_(False)
            self.position.requires_grad_(False)

    def forward(self, tokens):
        x = self.embed(tokens[:, :-1])
        x = x + self.position(torch.arange(x.shape[1]))
        if not x.requires_grad and self.way in ("reentrant", "own"):
            x = x.detach().requires_grad_(torch.is_grad_enabled())  # what reentrant users do to train under a frozen input
        for block in self.blocks:
            x = block(x) if self.inside else WAYS[self.way](block, x)
        logits = self.head(self.norm(x))
        return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


class Build:
    def __init__(self, *options):
        self.options = options

    def __call__(self):
        return CheckpointedGpt(*self.options)


def case_of(way, inside, frozen, tied):
    return Case(f"{way} inside={inside} frozen={frozen} tied={tied}", Build(way, inside, frozen, tied), CASES["gpt"].inputs)


MIXES = [(inside, frozen, tied) for inside in (False, True) for frozen, tied in (("none", True), ("first", False), ("between", False),
                                                                              ("embeddings", False))]


def every_mix(way, stages):
    results = {}
    for mix in MIXES:
        plain = train(case_of("plainly", *mix), 0, 3, 2)
        for stage in stages:
            got = train(case_of(way, *mix), stage, 3, 2)
            assert_same_bits(got, plain, f"stage {stage}, {way}, inside, frozen, tied = {mix}")
        results[mix] = plain
    return results


@pytest.mark.parametrize("way", list(WAYS)[1:])
def test_checkpointing_changes_no_bit(way):
    results = run(every_mix, 2, way, (0, 2, 3), timeout=120)[0]
    if way == "reentrant":
        for mix, got in results.items():
            close(got, reference_loop(case_of("plainly", *mix), 2, 3, 2))


def over_gloo():
    for way in ("reentrant", "non_reentrant"):
        for mix in (MIXES[0], MIXES[6]):
            with transport("shm"):
                shm = train(case_of(way, *mix), 3, 3)
            with transport("c10d"):
                assert_same_bits(train(case_of(way, *mix), 3, 3), shm, f"{way} {mix}")


def test_checkpointing_over_gloo():
    run(over_gloo, 2)
