# SPDX-License-Identifier: Apache-2.0
"""Layer norm (Ba, Kiros, Hinton 2016, arXiv:1607.06450) and RMS norm (Zhang, Sennrich 2019, arXiv:1910.07467), fused with the addition of
a residual.

Note [Rounding of norms]: x is float32, bfloat16 or float16; the arithmetic is float32 and results are rounded once, when written in x's
dtype. With a residual, ``h = x + residual`` is rounded first and the rounded h is normalised, as ``norm(x + residual)`` would. The weight is
applied before that one rounding. Hugging Face's LlamaRMSNorm and torch's own ``rms_norm`` on the CPU round ``x * rstd`` to x's dtype, then the
product with the weight: they agree with ours within one rounding, and ours is nearer to the exact value. With a float32 weight and a
narrower x, y still has x's dtype. Gemma's RMS norm, which multiplies by ``1 + weight``, is ``weight_offset=1.0``.

Gradients of gradients (``create_graph=True`` and a second backward) are refused with NotImplementedError.
"""
import math
import numbers

import torch

from deepspeed.ops._library import check_dense, check_given, ops


def layer_norm(x, normalized_shape, weight=None, bias=None, eps=1e-5, residual=None):
    """``(h - mean) / sqrt(variance + eps) * weight + bias`` over the last dimensions, where ``h = x + residual``.

    x: [..., *normalized_shape], float32, bfloat16 or float16, on the CPU or a GPU. residual: like x. weight and bias: of normalized_shape,
    both of x's dtype or both float32. The variance is that of the population. Returns y like x; with a residual ``(y, h)``, and gradients
    of both are taken. Raises ValueError naming the argument. Rounding: see Note [Rounding of norms].
    """
    shape = _shape_of(normalized_shape)
    _check_trailing(x, shape, residual)
    flat, residual = _flat(x, shape), _flat(residual, shape)
    weight, bias = _vector(weight, "weight", shape), _vector(bias, "bias", shape)
    if residual is None:
        return _unflat(ops().layer_norm(flat, weight, bias, eps)[0], x, shape)
    y, h, _, _ = ops().layer_norm_residual(flat, residual, weight, bias, eps)
    return _unflat(y, x, shape), _unflat(h, x, shape)


def rms_norm(x, weight=None, eps=1e-6, residual=None, *, normalized_shape=None, weight_offset=0.0):
    """``h / sqrt(mean(h^2) + eps) * (weight_offset + weight)``, where ``h = x + residual``.

    x: [..., *normalized_shape], float32, bfloat16 or float16, on the CPU or a GPU. residual: like x. weight: of normalized_shape, of x's dtype
    or float32. normalized_shape: default the weight's shape, without a weight the last dimension. Returns y like x; with a residual
    ``(y, h)``, and gradients of both are taken. Raises ValueError naming the argument. Rounding: see Note [Rounding of norms].
    """
    if normalized_shape is None:
        check_given(x=x)
        check_dense(weight=weight)
        normalized_shape = x.shape[-1:] if weight is None else weight.shape
    shape = _shape_of(normalized_shape)
    _check_trailing(x, shape, residual)
    flat, residual, weight = _flat(x, shape), _flat(residual, shape), _vector(weight, "weight", shape)
    if residual is None:
        return _unflat(ops().rms_norm(flat, weight, eps, weight_offset)[0], x, shape)
    y, h, _ = ops().rms_norm_residual(flat, residual, weight, eps, weight_offset)
    return _unflat(y, x, shape), _unflat(h, x, shape)


class FusedLayerNorm(torch.nn.Module):
    """:class:`torch.nn.LayerNorm` with the same arguments and the same state dict, by :func:`layer_norm`. ``forward(x, residual=None)``."""

    def __init__(self, normalized_shape, eps=1e-5, elementwise_affine=True, bias=True, device=None, dtype=None):
        super().__init__()
        self.normalized_shape = _shape_of(normalized_shape)
        self.eps = eps
        self.elementwise_affine = elementwise_affine
        made = {"device": device, "dtype": dtype}
        self.register_parameter("weight", _parameter(self.normalized_shape, made) if elementwise_affine else None)
        self.register_parameter("bias", _parameter(self.normalized_shape, made) if elementwise_affine and bias else None)
        self.reset_parameters()

    def reset_parameters(self):
        if self.weight is not None:
            torch.nn.init.ones_(self.weight)
        if self.bias is not None:
            torch.nn.init.zeros_(self.bias)

    def forward(self, x, residual=None):
        return layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps, residual)

    def extra_repr(self):
        return f"{self.normalized_shape}, eps={self.eps}, elementwise_affine={self.elementwise_affine}"


class FusedRMSNorm(torch.nn.Module):
    """:class:`torch.nn.RMSNorm` with the same arguments and the same state dict, by :func:`rms_norm`. ``forward(x, residual=None)``.

    eps=None stands for the spacing of x's dtype at one, as in torch. weight_offset is added to the weight, which then begins with
    ``1 - weight_offset`` (1.0: Gemma, whose weights begin with zeros).
    """

    def __init__(self, normalized_shape, eps=None, elementwise_affine=True, device=None, dtype=None, *, weight_offset=0.0):
        super().__init__()
        self.normalized_shape = _shape_of(normalized_shape)
        self.eps = eps
        self.elementwise_affine = elementwise_affine
        self.weight_offset = weight_offset
        made = {"device": device, "dtype": dtype}
        self.register_parameter("weight", _parameter(self.normalized_shape, made) if elementwise_affine else None)
        self.reset_parameters()

    def reset_parameters(self):
        if self.weight is not None:
            torch.nn.init.constant_(self.weight, 1.0 - self.weight_offset)

    def forward(self, x, residual=None):
        eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps
        # without a weight there is nothing to offset
        offset = self.weight_offset if self.weight is not None else 0.0
        return rms_norm(x, self.weight, eps, residual, normalized_shape=self.normalized_shape, weight_offset=offset)

    def extra_repr(self):
        offset = f", weight_offset={self.weight_offset}" if self.weight_offset else ""
        return f"{self.normalized_shape}, eps={self.eps}, elementwise_affine={self.elementwise_affine}{offset}"


def _parameter(shape, made):
    return torch.nn.Parameter(torch.empty(shape, **made))


def _shape_of(normalized_shape):
    shape = (normalized_shape,) if isinstance(normalized_shape, numbers.Integral) else tuple(normalized_shape)
    if not shape:
        raise ValueError("normalized_shape must have at least one dimension")
    return shape


def _check_trailing(x, shape, residual):
    check_given(x=x)
    check_dense(residual=residual)
    if tuple(x.shape[-len(shape):]) != shape:
        raise ValueError(f"x has shape {list(x.shape)}, which does not end in normalized_shape {list(shape)}")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual has shape {list(residual.shape)}, x {list(x.shape)}")


def _flat(x, shape):
    """The operators normalise over one dimension."""
    if x is None or len(shape) == 1:
        return x
    return x.reshape(*x.shape[:max(0, x.dim() - len(shape))], math.prod(shape))


def _unflat(y, x, shape):
    return y if len(shape) == 1 else y.view(x.shape)


def _vector(parameter, name, shape):
    if parameter is None:
        return None
    check_dense(**{name: parameter})
    if tuple(parameter.shape) != shape:
        raise ValueError(f"{name} has shape {list(parameter.shape)}, normalized_shape is {list(shape)}")
    return parameter if len(shape) == 1 else parameter.reshape(-1)
