# SPDX-License-Identifier: Apache-2.0
"""The tiny model behind the checkpoints in this folder, and its batches. Used by make.py (under DeepSpeed) and by the tests (under this library)."""
import torch


class Tiny(torch.nn.Module):
    """Has what checkpoints must get right: a tied weight, a frozen layer in the middle, a scalar parameter, sizes that no rank count divides,
    a persistent buffer, one that is not, and parameters of two groups."""

    def __init__(self, frozen=True):
        super().__init__()
        self.embed = torch.nn.Embedding(11, 6)
        self.first = torch.nn.Linear(6, 7)
        self.frozen = torch.nn.Linear(7, 7)
        self.second = torch.nn.Linear(7, 6)
        self.head = torch.nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight
        self.scale = torch.nn.Parameter(torch.ones(1))
        self.register_buffer("offset", torch.arange(6, dtype=torch.float32) / 7)
        self.register_buffer("scratch", torch.zeros(3), persistent=False)
        self.frozen.requires_grad_(not frozen)

    def forward(self, tokens):
        hidden = self.embed(tokens)
        hidden = torch.tanh(self.first(hidden + self.offset.to(hidden.dtype)))
        hidden = self.second(torch.tanh(self.frozen(hidden))) * self.scale
        logits = self.head(hidden)
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())


def make_model(frozen=True):
    torch.manual_seed(5)
    return Tiny(frozen)


def make_batch(step, rank=0):
    return torch.randint(0, 11, (2, 5), generator=torch.Generator().manual_seed(100 * step + rank))


def make_groups(model, count):
    """One group, or two: matrices with decay, vectors without."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if count == 1:
        return [{"params": trained}]
    return [{"params": [p for p in trained if p.dim() > 1], "weight_decay": 0.1},
            {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0, "lr": 0.003}]
