# SPDX-License-Identifier: Apache-2.0
"""TiledLinear: one large linear layer as a grid of small ones, so that only a tile at a time need be gathered."""
import contextlib

import torch
from torch import nn

from deepspeed.zero.recognise import is_zero_param


def split_sizes(extent, parts):
    """`extent` in `parts` nearly equal sizes, larger ones first."""
    if not 1 <= parts <= extent:
        raise ValueError(f"cannot split {extent} features into {parts} tiles: from 1 to {extent} is possible")
    small, larger = divmod(extent, parts)
    return [small + 1] * larger + [small] * (parts - larger)


class TiledLinear(nn.Module):
    """Equal to nn.Linear(in_features, out_features, bias), cut into out_splits x in_splits tiles.

    input_is_already_split: forward gets a list of the in_splits parts of the input's last dimension.
    combine_out_splits: False returns the list of out_splits parts of the output instead of their concatenation.
    linear_cls(in, out, bias=..., **kwargs) builds a tile; init_linear is a layer of the full size whose values are taken.
    The bias of an output part is held by its last tile; tiles before it have none.
    """

    def __init__(self, in_features, out_features, bias=True, in_splits=1, out_splits=1, input_is_already_split=False,
                 combine_out_splits=True, linear_cls=nn.Linear, init_linear=None, **kwargs):
        super().__init__()
        self.in_features, self.out_features, self.use_bias = in_features, out_features, bias
        self.in_splits, self.out_splits = in_splits, out_splits
        self.input_is_already_split = input_is_already_split
        self.combine_out_splits = combine_out_splits
        self.in_sizes = split_sizes(in_features, in_splits)
        self.out_sizes = split_sizes(out_features, out_splits)
        self.linears = nn.ModuleList(
            nn.ModuleList(
                linear_cls(in_size, out_size, bias=bias and column == in_splits - 1, **kwargs)
                for column, in_size in enumerate(self.in_sizes))
            for out_size in self.out_sizes)
        if init_linear is not None:
            self.copy_params_from(init_linear)

    def forward(self, input_):
        if self.input_is_already_split:
            if len(input_) != self.in_splits:
                raise ValueError(f"TiledLinear got {len(input_)} input parts, it was built for {self.in_splits}")
            parts = list(input_)
        else:
            parts = input_.split(self.in_sizes, dim=-1)
        outputs = [self._row(row, parts) for row in self.linears]
        return self._combine(outputs) if self.combine_out_splits else outputs

    def _row(self, row, parts):
        total = None
        for tile, part in zip(row, parts):
            total = self._add(total, tile(part))
        return total

    def _add(self, total, output):
        return output if total is None else total + output

    def _combine(self, outputs):
        return torch.cat(outputs, dim=-1)

    @torch.no_grad()
    def copy_params_from(self, other):
        """Takes weight (out_features, in_features) and bias of a layer of the full size, either of which may be partitioned."""
        if tuple(_full_shape(other.weight)) != (self.out_features, self.in_features):
            raise ValueError(f"copy_params_from: weight is {tuple(_full_shape(other.weight))}, "
                             f"this layer {(self.out_features, self.in_features)}")
        if self.use_bias != (other.bias is not None):
            raise ValueError("copy_params_from: one of the two layers has a bias and the other has none")
        with _gathered([other.weight, other.bias]):
            for row, weights, biases in zip(self.linears, other.weight.split(self.out_sizes, dim=0), self._bias_parts(other)):
                for tile, weight in zip(row, weights.split(self.in_sizes, dim=1)):
                    self._assign(tile.weight, weight)
                if self.use_bias:
                    self._assign(row[-1].bias, biases)

    def _bias_parts(self, other):
        return other.bias.split(self.out_sizes) if self.use_bias else [None] * self.out_splits

    @staticmethod
    def _assign(parameter, value):
        with _gathered([parameter], modifier_rank=0):
            parameter.data.copy_(value)


class TiledLinearReturnBias(TiledLinear):
    """TiledLinear of layers that return (output, bias) and leave it to the caller to add the bias."""

    def _add(self, total, output):
        value, bias = output if isinstance(output, tuple) else (output, None)
        if total is None:
            return value, bias
        return total[0] + value, total[1] if bias is None else (bias if total[1] is None else total[1] + bias)

    def _combine(self, outputs):
        values, biases = zip(*outputs)
        return torch.cat(values, dim=-1), (None if any(bias is None for bias in biases) else torch.cat(biases, dim=-1))


def _full_shape(parameter):
    return getattr(parameter, "ds_shape", parameter.shape)


def _gathered(parameters, modifier_rank=None):
    sharded = [p for p in parameters if is_zero_param(p)]
    if not sharded:
        return contextlib.nullcontext()
    from deepspeed.zero.gathered import GatheredParameters

    return GatheredParameters(sharded, modifier_rank=modifier_rank)
