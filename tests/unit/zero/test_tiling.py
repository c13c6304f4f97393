# SPDX-License-Identifier: Apache-2.0
"""A grid of tiles computes what the whole layer does: outputs, and gradients of every parameter and of the input."""
import pytest
import torch

from deepspeed.zero.tiling import TiledLinear, TiledLinearReturnBias, split_sizes

# fp64: the tiles add at most 7 + 1 products in another order than the whole layer does.
TOLERANCE = dict(rtol=16 * torch.finfo(torch.float64).eps, atol=64 * torch.finfo(torch.float64).eps)


def test_split_sizes():
    assert split_sizes(7, 3) == [3, 2, 2] and split_sizes(6, 3) == [2, 2, 2] and split_sizes(3, 1) == [3]
    for extent, parts in ((3, 4), (3, 0)):
        with pytest.raises(ValueError, match=f"cannot split {extent} features into {parts} tiles"):
            split_sizes(extent, parts)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("in_splits,out_splits", [(1, 1), (1, 3), (2, 1), (3, 2), (7, 5)])
def test_equals_linear(in_splits, out_splits, bias):
    torch.manual_seed(1)
    whole = torch.nn.Linear(7, 5, bias=bias, dtype=torch.float64)
    tiled = TiledLinear(7, 5, bias, in_splits, out_splits, init_linear=whole, dtype=torch.float64)
    x = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    whole(x).square().sum().backward()
    out = tiled(y)
    out.square().sum().backward()
    torch.testing.assert_close(out, whole(x), **TOLERANCE)
    torch.testing.assert_close(y.grad, x.grad, **TOLERANCE)
    weight_grad = torch.cat([torch.cat([tile.weight.grad for tile in row], dim=1) for row in tiled.linears])
    torch.testing.assert_close(weight_grad, whole.weight.grad, **TOLERANCE)
    if bias:
        torch.testing.assert_close(torch.cat([row[-1].bias.grad for row in tiled.linears]), whole.bias.grad, **TOLERANCE)
    assert sum(p.numel() for p in tiled.parameters()) == sum(p.numel() for p in whole.parameters())


def test_split_input_and_separate_outputs():
    whole = torch.nn.Linear(4, 6, dtype=torch.float64)
    tiled = TiledLinear(4, 6, in_splits=2, out_splits=3, input_is_already_split=True, combine_out_splits=False, init_linear=whole,
                        dtype=torch.float64)
    x = torch.randn(2, 4, dtype=torch.float64)
    outputs = tiled(x.split(2, dim=-1))
    assert [out.shape[-1] for out in outputs] == [2, 2, 2]
    torch.testing.assert_close(torch.cat(outputs, -1), whole(x), **TOLERANCE)
    with pytest.raises(ValueError, match="got 1 input parts, it was built for 2"):
        tiled([x])


class LinearReturningBias(torch.nn.Linear):
    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight), self.bias


@pytest.mark.parametrize("bias", [True, False])
def test_return_bias(bias):
    whole = torch.nn.Linear(5, 4, bias=bias, dtype=torch.float64)
    tiled = TiledLinearReturnBias(5, 4, bias, 2, 2, linear_cls=LinearReturningBias, init_linear=whole, dtype=torch.float64)
    x = torch.randn(3, 5, dtype=torch.float64)
    out, got = tiled(x)
    assert (got is None) != bias
    torch.testing.assert_close(out if got is None else out + got, whole(x), **TOLERANCE)


def test_layers_that_do_not_fit():
    with pytest.raises(ValueError, match=r"weight is \(3, 3\), this layer \(4, 3\)"):
        TiledLinear(3, 4, init_linear=torch.nn.Linear(3, 3))
    with pytest.raises(ValueError, match="has a bias and the other has none"):
        TiledLinear(3, 4, init_linear=torch.nn.Linear(3, 4, bias=False))
