# SPDX-License-Identifier: Apache-2.0
"""Blockwise quantisation: int8, int4 and narrow floating-point formats with one float32 scale for every ``group_size`` elements.

A tensor is taken as a flat array in the order of its elements and cut into blocks (the last may be shorter). ``csrc/kernels/quantize/quantize.h``
gives the bytes and the arithmetic; the codes of ``fp8_e4m3`` and ``fp8_e5m2`` are those of ``torch.float8_e4m3fn`` and ``torch.float8_e5m2``. The
same input has the same bytes on the CPU (any number of threads, any instruction set) and on a GPU.

A block that holds an infinity or NaN reads back as NaN, all of it. A block of zeros reads back as zeros.
"""
from dataclasses import dataclass
from typing import Optional, Sequence, Tuple

import torch

from deepspeed.ops._library import check_given, ops

# Bits a code takes.
FORMATS = {"int8": 8, "int4": 4, "fp8_e4m3": 8, "fp8_e5m2": 8, "fp6_e3m2": 6, "fp4_e2m1": 4, "fp12_e4m7": 12}


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """What :func:`quantize` makes.

    data: uint8 [bytes], see :func:`data_nbytes`. scale: float32 [blocks]. zero_point: float32 [blocks], the value of code 0 in asymmetric
    blocks, or float32 [0]. shape, dtype: of the tensor that was quantised; ``dtype`` is what :func:`dequantize` gives unless told otherwise.
    """
    data: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor
    format: str
    group_size: int
    shape: Tuple[int, ...]
    dtype: torch.dtype

    @property
    def symmetric(self):
        return self.zero_point.numel() == 0

    @property
    def nbytes(self):
        """Bytes of the three arrays together."""
        return sum(t.numel() * t.element_size() for t in (self.data, self.scale, self.zero_point))


def bits_of(format):
    """Bits a code of that format takes."""
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, not {format!r}")
    return FORMATS[format]


def data_nbytes(numel, format, group_size):
    """Bytes of ``data`` for so many elements: every block begins at a byte of its own."""
    bits = bits_of(format)
    if group_size < 1:
        raise ValueError(f"group_size must be at least 1, got {group_size}")
    return numel // group_size * ((group_size * bits + 7) // 8) + (numel % group_size * bits + 7) // 8


def _seed_of(stochastic, seed):
    """The given seed or, for stochastic rounding without one, the next number of torch's CPU generator."""
    if seed is not None or not stochastic:
        return int(seed or 0)
    return int(torch.randint(2**62, (), device="cpu"))


def quantize(x, format="int8", group_size=128, symmetric=True, *, stochastic=False, seed=None, offset=0, residual=None):
    """Quantises a float32, bfloat16 or float16 tensor of any shape; no gradient passes.

    symmetric: the scale is max|x| / (largest code) of the block. Otherwise, for int8 and int4 only, codes go from the block's smallest to its
    largest value. The error is at most half the distance between neighbouring codes.
    stochastic: round up with the probability of the fraction, so that the mean over seeds is x; the error then is at most the whole distance.
    The bits are a function of (seed, offset, element's index), see ``csrc/kernels/philox.h``. offset: a multiple of 4.
    Without a seed one is drawn from torch's CPU generator (pass one in compiled code).
    residual: float32, contiguous, of x's shape. x + residual is quantised and what it lost is left there for the next time (error feedback, Seide
    et al. 2014; zero for blocks that are not finite).
    Raises ValueError, naming the argument, for what does not fit.
    """
    check_given(x=x)
    rounding = (stochastic, _seed_of(stochastic, seed), offset)
    if residual is None:
        parts = ops().quantize(x, format, group_size, symmetric, *rounding)
    else:
        parts = ops().quantize_feedback(x, residual, format, group_size, symmetric, *rounding)
    return QuantizedTensor(*parts, format=format, group_size=group_size, shape=tuple(x.shape), dtype=x.dtype)


def dequantize(quantized, dtype=None):
    """The tensor back, in its own dtype or float32, bfloat16 or float16 as told. Computed in float32, rounded once."""
    q = quantized
    return ops().dequantize(q.data, q.scale, q.zero_point, q.shape, q.format, q.group_size, dtype or q.dtype)


def _lists(chunks):
    """(data, scale, zero_point) of quantised tensors that must agree in all else."""
    if len(chunks) == 0:
        raise ValueError("chunks: nothing to reduce")
    first = chunks[0]
    for i, chunk in enumerate(chunks):
        for name in ("format", "group_size", "shape", "symmetric"):
            if getattr(chunk, name) != getattr(first, name):
                raise ValueError(f"chunks[{i}]: {name} is {getattr(chunk, name)!r}, chunks[0] has {getattr(first, name)!r}")
    zero_points = [] if first.symmetric else [c.zero_point for c in chunks]
    return [c.data for c in chunks], [c.scale for c in chunks], zero_points


def dequantize_reduce(chunks: Sequence[QuantizedTensor], mean=False, dtype: Optional[torch.dtype] = None):
    """The sum (or mean) of quantised tensors of one shape, format and group size, added in float32 in the order given, in one pass.

    For a compressed reduce-scatter: chunks[r] is what rank r sent for this rank's slice. The arrays may be views of one receive buffer. dtype: of the
    result, the first chunk's own by default.
    """
    data, scale, zero_point = _lists(chunks)
    first = chunks[0]
    factor = 1.0 / len(chunks) if mean else 1.0
    return ops().dequantize_reduce(data, scale, zero_point, first.shape, first.format, first.group_size, factor, dtype or first.dtype)[0]


def dequantize_reduce_quantize(chunks: Sequence[QuantizedTensor], mean=False, *, format=None, symmetric=None, dtype=None, stochastic=False,
                               seed=None, offset=0):
    """As :func:`dequantize_reduce`, quantised once more in the same pass: (QuantizedTensor, sum as a tensor of ``dtype`` or None).

    format, symmetric: of the result; by default the chunks' own (floating-point formats are always symmetric). The group size stays. The sum
    itself is written only if a dtype is given.
    """
    data, scale, zero_point = _lists(chunks)
    first = chunks[0]
    format = first.format if format is None else format
    symmetric = (first.symmetric or not format.startswith("int")) if symmetric is None else symmetric
    factor = 1.0 / len(chunks) if mean else 1.0
    total, *parts = ops().dequantize_reduce(data, scale, zero_point, first.shape, first.format, first.group_size, factor, dtype, format,
                                            symmetric, stochastic, _seed_of(stochastic, seed), offset)
    again = QuantizedTensor(*parts, format=format, group_size=first.group_size, shape=first.shape, dtype=first.dtype)
    return again, (None if dtype is None else total)


def fake_quantize(x, bits=8, group_size=128, symmetric=True, *, format=None, stochastic=False, seed=None, offset=0):
    """x quantised and read back in one pass, in x's dtype, for quantisation-aware training: the gradient passes unchanged (straight-through
    estimator, Bengio et al. 2013).

    bits: 8 or 4, for int8 and int4; or ``format`` names one of :data:`FORMATS` and ``bits`` is not looked at. The rest is as for :func:`quantize`.
    """
    check_given(x=x)
    if format is None:
        if bits not in (4, 8):
            raise ValueError(f"bits must be 8 or 4 (or give format), got {bits!r}")
        format = f"int{bits}"
    return ops().fake_quantize(x, format, group_size, symmetric, stochastic, _seed_of(stochastic, seed), offset)
