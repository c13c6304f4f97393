# SPDX-License-Identifier: Apache-2.0
"""Softmax over the last dimension with scale, mask and causality in one pass over the rows."""
import torch

from deepspeed.ops._library import ops


def scaled_masked_softmax(x, mask=None, scale=1.0, causal=False):
    """softmax(scale * x + mask) over the last dimension, in x's shape and dtype; computed in float32, rounded once.

    x: float32, bfloat16 or float16, [..., columns]; for attention [batch, heads, queries, keys].
    mask: None, a float tensor that is added (float32, bfloat16 or float16) or a bool tensor that hides where it is **True**; its shape must
        broadcast to x's, such as [batch, 1, 1, keys]. It is read through its strides. Copied are: a mask whose last dimension is strided, to its
        own size; one with a single value a row, such as [batch, heads, queries, 1], to as many columns as x has; and, to x's whole size,
        one whose other dimensions, repeated ones included, do not join into six of one stride each. A float mask that requires a gradient gets one.
    causal: hides from query i the keys after i + keys - queries, so that the last query sees every key. What is hidden is neither
        read nor computed.

    A row whose elements are all hidden (or are all -inf) gives zeros and gets zero gradients, where torch.softmax gives NaN. A mask of
    finite numbers, however low, hides no row entirely: such a row's softmax is that of the sums.
    Raises ValueError naming the argument for a wrong dtype, device or shape.
    """
    return ops().scaled_masked_softmax(x, mask, scale, causal)


class FusedSoftmax(torch.nn.Module):
    """scaled_masked_softmax() as a module: `scale` and `causal` are fixed, the mask is given with each input."""

    def __init__(self, scale=1.0, causal=False):
        super().__init__()
        self.scale, self.causal = scale, causal

    def forward(self, x, mask=None):
        return scaled_masked_softmax(x, mask, self.scale, self.causal)

    def extra_repr(self):
        return f"scale={self.scale}, causal={self.causal}"
