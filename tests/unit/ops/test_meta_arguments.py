# SPDX-License-Identifier: Apache-2.0
"""Tensors on the meta device: sizes without values come out, and mixtures with tensors elsewhere are refused instead of giving unwritten memory."""
import pytest
import torch

from deepspeed.ops.activations import bias_gelu, dropout_add, geglu, swiglu
from deepspeed.ops.cross_entropy import cross_entropy, linear_cross_entropy
from deepspeed.ops.normalization import layer_norm, rms_norm
from deepspeed.ops.quantizer import QuantizedTensor, dequantize, dequantize_reduce, quantize
from deepspeed.ops.rope import apply_rotary
from deepspeed.ops.softmax import scaled_masked_softmax


def _dequantize(data, scale):
    return dequantize(QuantizedTensor(data, scale, scale.new_empty(0), "int8", 4, (3, 8), torch.float32))


def _reduce(data, scale):
    chunk = quantize(torch.ones(3, 8), group_size=4)
    return dequantize_reduce([chunk, QuantizedTensor(data, scale, chunk.zero_point, "int8", 4, (3, 8), torch.float32)])


X, LABELS, POSITIONS = torch.ones(3, 8), torch.zeros(3, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)
CODES, SCALES, HEADS, TABLE = torch.zeros(24, dtype=torch.uint8), torch.ones(6), torch.ones(2, 4, 3, 8), torch.ones(4, 4)
CALLS = {  # {name: (call, {argument: tensor})}
    "layer_norm": (lambda x, weight, bias: layer_norm(x, 8, weight, bias), dict(x=X, weight=X[0], bias=X[0])),
    "rms_norm": (lambda x, residual: rms_norm(x, residual=residual)[0], dict(x=X, residual=X)),
    "softmax": (lambda x, mask: scaled_masked_softmax(x, mask), dict(x=X, mask=X)),
    "bias_gelu": (bias_gelu, dict(x=X, bias=X[0])),
    "swiglu": (swiglu, dict(gate=X, up=X)),
    "geglu of halves": (lambda x, bias: geglu(x, bias=bias), dict(x=X, bias=X[0])),
    "dropout_add": (lambda x, residual, bias: dropout_add(x, residual, 0.5, bias=bias), dict(x=X, residual=X, bias=X[0])),
    "rope": (lambda q, k, cos, sin: apply_rotary(q, k, cos, sin)[0], dict(q=HEADS, k=HEADS, cos=TABLE, sin=TABLE)),
    "rope at positions": (lambda q, positions: apply_rotary(q, q, TABLE, TABLE, positions)[0], dict(q=HEADS, positions=POSITIONS)),
    "cross_entropy": (lambda logits, labels: cross_entropy(logits, labels, reduction="none"), dict(logits=X, labels=LABELS)),
    "linear_cross_entropy": (lambda hidden, weight, bias, labels: linear_cross_entropy(hidden, weight, labels, bias),
                             dict(hidden=X, weight=torch.ones(5, 8), bias=torch.ones(5), labels=LABELS)),
    "dequantize": (_dequantize, dict(data=CODES, scale=SCALES)),
    "dequantize_reduce": (_reduce, dict(data=CODES, scale=SCALES)),
}


@pytest.mark.parametrize("name", CALLS)
def test_one_argument_on_another_device_is_named(name):
    call, arguments = CALLS[name]
    call(**arguments)
    for moved in arguments:
        with pytest.raises(ValueError, match="lies on"):
            call(**{**arguments, moved: arguments[moved].to("meta")})
    last = list(arguments)[-1]
    with pytest.raises(ValueError, match=f"{last} lies on meta, .* on cpu"):
        call(**{**arguments, last: arguments[last].to("meta")})


@pytest.mark.parametrize("name", [name for name in CALLS if name not in ("rope at positions", "dequantize_reduce")])
def test_all_on_meta_gives_sizes(name):
    call, arguments = CALLS[name]
    result = call(**{key: value.to("meta") for key, value in arguments.items()})
    assert result.is_meta and result.shape == call(**arguments).shape
