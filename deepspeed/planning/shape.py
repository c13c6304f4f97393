# SPDX-License-Identifier: Apache-2.0
"""A model as sizes: its module tree and how many elements each module's parameters have."""
from typing import NamedTuple

from deepspeed._native import core

HIDDEN_PER_LAYER = 128   # usual proportion of decoders: 4096 / 32, 5120 / 40, 8192 / 80
_HIDDEN_MULTIPLE = 128


class ParamSize(NamedTuple):
    numel: int
    element_bytes: int = 4    # as the model is built
    floating: bool = True     # becomes the run's low-precision type, if it has one
    trained: bool = True

    def planned(self, compute_bytes):
        """(numel, element bytes, trainable) under a run that computes in a type of `compute_bytes` (0: each parameter's own)."""
        return self.numel, compute_bytes if compute_bytes and self.floating else self.element_bytes, self.trained


class Shape(NamedTuple):
    """nodes: PlanModules in pre-order; params: the ParamSizes that each of them owns."""
    nodes: list
    params: list
    numel: int
    trained: int
    layers: int
    hidden: int
    vocabulary: int
    assumed: str       # what was guessed, "" when nothing was


def _block_numel(hidden):
    return 12 * hidden * hidden + 13 * hidden


def _proportions(params, layers, hidden):
    if hidden is None and layers is None:
        hidden = (params * HIDDEN_PER_LAYER / 12)**(1 / 3)
        hidden = max(64, round(hidden / _HIDDEN_MULTIPLE) * _HIDDEN_MULTIPLE or 64)
    if hidden is None:
        hidden = max(64, int((0.95 * params / (12 * layers))**0.5) // 64 * 64)
    if layers is None:
        layers = max(1, int(0.97 * params / _block_numel(hidden)))
    return layers, hidden


def decoder(params, layers=None, hidden=None):
    """A decoder-only transformer of exactly `params` parameters: equal blocks (attention 4h², feed-forward 8h²), and what is left
    over shared between the embedding and the head. Layers and hidden size that are not given are chosen in the usual proportion."""
    assumed = "" if layers and hidden else "shape of the model"
    layers, hidden = _proportions(params, layers, hidden)
    rest = params - layers * _block_numel(hidden) - 2 * hidden
    if rest < 0:
        raise ValueError(f"{layers} layers of hidden size {hidden} alone have {layers * _block_numel(hidden):,} parameters, more than the "
                         f"{params:,} of --params: give fewer --layers, a smaller --hidden or more --params")
    if assumed:
        assumed = f"{layers} layers of hidden size {hidden} (--layers and --hidden, or --model, say otherwise)"
    nodes, sizes = [], []

    def add(parent, *numels, container=False, repeated=False):
        nodes.append(core().PlanModule(parent, sum(numels), container=container, repeated=repeated))
        sizes.append([ParamSize(n) for n in numels if n])
        return len(nodes) - 1

    h = hidden
    root = add(-1)
    add(root, rest - rest // 2)
    blocks = add(root, container=True)
    for _ in range(layers):
        block = add(blocks, repeated=True)
        for numels in ((h, h), (3 * h * h, 3 * h), (h * h, h), (h, h), (4 * h * h, 4 * h), (4 * h * h, h)):
            add(block, *numels)
    add(root, h, h)
    add(root, rest // 2)
    return Shape(nodes, sizes, params, params, layers, hidden, rest // 2 // hidden, assumed)


def of_model(model, leaf_paths=(), layers=0, hidden=0):
    """The sizes of a torch module, which may be on the meta device."""
    from deepspeed.zero.units import read_tree
    tree = read_tree(model, leaf_paths)

    def size(parameter):
        numel = getattr(parameter, "ds_numel", None) or parameter.numel()
        return ParamSize(numel, parameter.element_size(), parameter.is_floating_point(), parameter.requires_grad)

    params = [[size(p) for _, p in own] for own in tree.owned]
    every = [entry for own in params for entry in own]
    return Shape(tree.nodes, params, sum(p.numel for p in every), sum(p.numel for p in every if p.trained), layers, hidden, 0, "")
