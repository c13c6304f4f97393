# SPDX-License-Identifier: Apache-2.0
"""Floating-point quantisers under the names users know; :mod:`deepspeed.ops.quantizer` does the work.

``q_bits`` chooses the format: 4 (e2m1), 6 (e3m2), 8 (e4m3, or e5m2 with ``q_mantisa_bits=2``), 12 (e4m7). ``q_mantisa_bits`` is looked at for 8 bits
only. Codes of 8 bits are those of torch.float8_e4m3fn and torch.float8_e5m2.
"""
import math

import torch

from deepspeed.ops import quantizer

_BY_BITS = {4: "fp4_e2m1", 6: "fp6_e3m2", 12: "fp12_e4m7"}


def _format(q_bits, q_mantisa_bits):
    if q_bits == 8:
        if q_mantisa_bits not in (2, 3):
            raise ValueError(f"q_mantisa_bits must be 3 or 2 for q_bits=8, got {q_mantisa_bits!r}")
        return "fp8_e4m3" if q_mantisa_bits == 3 else "fp8_e5m2"
    if q_bits not in _BY_BITS:
        raise ValueError(f"q_bits must be 4, 6, 8 or 12, got {q_bits!r}")
    return _BY_BITS[q_bits]


class Quantizer:
    """Quantises float32, bfloat16 and float16 tensors in groups of ``group_size`` elements and remembers scales, shape and dtype of the last one."""

    def __init__(self, group_size=512):
        if not isinstance(group_size, int) or group_size < 1:
            raise ValueError(f"group_size must be an integer of at least 1, got {group_size!r}")
        self.group_size = group_size
        self.orig_shape = self.orig_dtype = self.scale = None

    def quantize(self, input, q_bits=8, q_mantisa_bits=3, stochastic_mode=False, return_meta_tensor=False):
        """The codes: uint8 [groups, bytes of a group], or [bytes] if the last group is shorter. With return_meta_tensor: (codes, scales),
        scales float32 [groups]. stochastic_mode draws its seed from torch's CPU generator."""
        q = quantizer.quantize(input, _format(q_bits, q_mantisa_bits), self.group_size, stochastic=stochastic_mode)
        self.orig_shape, self.orig_dtype, self.scale = q.shape, q.dtype, q.scale
        whole = input.numel() > 0 and input.numel() % self.group_size == 0
        codes = q.data.view(q.scale.numel(), -1) if whole else q.data
        return (codes, q.scale) if return_meta_tensor else codes

    def dequantize(self, input_q, fp_out=None, q_bits=8, q_mantisa_bits=3, scale=None):
        """The values of the codes: written to ``fp_out`` and in its shape, if given; otherwise in shape and dtype of what was quantised last.
        scale: if not that of the last :meth:`quantize`."""
        shape, dtype = (self.orig_shape, self.orig_dtype) if fp_out is None else (fp_out.shape, fp_out.dtype)
        scale = self.scale if scale is None else scale
        if scale is None:
            raise ValueError("scale: nothing was quantised here before, so it must be given")
        if shape is None:
            raise ValueError("fp_out: nothing was quantised here before, so it must be given")
        values = self._read(input_q, scale, shape, dtype, _format(q_bits, q_mantisa_bits))
        return values if fp_out is None else fp_out.copy_(values)

    def _read(self, codes, scale, shape, dtype, format):
        return quantizer.dequantize(quantizer.QuantizedTensor(codes, scale, scale.new_empty(0), format, self.group_size, tuple(shape), dtype))


class FP_Quantize(Quantizer):
    """As :class:`Quantizer`, with the group size of a configuration object (attribute ``group_size``; None: 512)."""

    def __init__(self, quantization_config):
        super().__init__(512 if quantization_config is None else quantization_config.group_size)
        self.q_config = quantization_config

    def to(self, *args, **kwargs):
        """Nothing to move but the scales."""
        if self.scale is not None:
            self.scale = self.scale.to(*args, **kwargs).float()
        return self

    def get_scales(self):
        """Scales of the last :meth:`quantize`, float32 [groups]."""
        return self.scale

    def selective_dequantize(self, input_q, indexes, fp_out=None, q_bits=8, q_mantisa_bits=3, scale=None):
        """The slices ``indexes`` (integers, [k]) of the first dimension: [k, *rest of the shape]. Only their own codes are read if a slice is a whole
        number of groups; otherwise groups reach over slices, and all codes are read."""
        if self.orig_shape is None:
            raise ValueError("input_q: nothing was quantised here before, so its shape is not known")
        scale = self.scale if scale is None else scale
        if not self.orig_shape:
            raise ValueError("input_q: what was quantised last is a single number and has no slices")
        format, dtype = _format(q_bits, q_mantisa_bits), self.orig_dtype if fp_out is None else fp_out.dtype
        slices, slice_shape = self.orig_shape[0], self.orig_shape[1:]
        groups, rest = divmod(math.prod(slice_shape), self.group_size)
        sizes = slices * groups, quantizer.data_nbytes(math.prod(self.orig_shape), format, self.group_size)
        if groups == 0 or rest or (scale.numel(), input_q.numel()) != sizes:
            values = self._read(input_q, scale, self.orig_shape, dtype, format)[indexes]  # refuses codes and scales of other sizes
        else:
            codes, scales = input_q.reshape(slices, -1)[indexes], scale.reshape(slices, groups)[indexes]
            values = self._read(codes.reshape(-1), scales.reshape(-1), (len(codes), *slice_shape), dtype, format)
        return values if fp_out is None else fp_out.copy_(values)


def matmul_fp8(inp, weight, scale, quantization_group_size, quantizer):
    """inp @ weight for quantised weights: dequantised in inp's dtype, then multiplied. quantizer: the one that quantised the weight."""
    if quantizer.group_size != quantization_group_size:
        raise ValueError(f"quantization_group_size is {quantization_group_size}, the quantizer's {quantizer.group_size}")
    if quantizer.orig_shape is None:
        raise ValueError("quantizer: nothing was quantised by it")
    values = torch.empty(quantizer.orig_shape, dtype=inp.dtype, device=inp.device)
    return torch.matmul(inp, quantizer.dequantize(weight, fp_out=values, scale=scale))
