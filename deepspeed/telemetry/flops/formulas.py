# SPDX-License-Identifier: Apache-2.0
"""What an ATen operation costs, from the shapes of its arguments.

Note [What is counted]: a multiply-accumulate (MAC) of a matrix product, convolution, attention or recurrent layer is two floating-point
operations (FLOPs). Their formulas are those of torch.utils.flop_counter, and those below for operations it has none for. Everything
else counts per element, with no MACs: a pointwise operation 1 of every element of its result, softmax, pooling and reductions 1 of
every element of their argument, a normalisation 4, or 5 with a weight (a batch norm with fixed statistics 2), a convolution's
bias 1. Indexing, copies, comparisons and embeddings are free. The bias of a linear layer is part of its matrix product.
"""
from math import prod
from typing import NamedTuple

import torch
from torch.utils.flop_counter import flop_registry


class Cost(NamedTuple):
    macs: int
    flops: int


def _attention(query, key, value, *_, **__):
    batch, heads, length, width = query.shape
    return batch * heads * length * key.shape[-2] * (width + value.shape[-1])


def _trilinear(first, second, third, expand1, expand2, expand3, sumdim, *_, **__):
    shapes = []
    for tensor, added in ((first, expand1), (second, expand2), (third, expand3)):
        for dim in sorted(added):
            tensor = tensor.unsqueeze(dim)
        shapes.append(tensor.shape)
    return prod(torch.broadcast_shapes(*shapes))


def _rows(tensor):
    return tensor.numel() // max(1, tensor.shape[-1])


def _mkldnn_rnn(sequence, weight_in, weight_hidden, *_, **__):
    return _rows(sequence) * (weight_in.numel() + weight_hidden.numel())


def _cudnn_rnn(sequence, weights, *_, **__):
    return _rows(sequence) * sum(weight.numel() for weight in weights if weight.dim() == 2)


_MACS = {
    "aten::_scaled_dot_product_flash_attention_for_cpu": _attention,
    "aten::_scaled_dot_product_fused_attention_overrideable": _attention,
    "aten::linear": lambda x, weight, *_, **__: _rows(x) * weight.numel(),
    "aten::mv": lambda matrix, vector: matrix.numel(),
    "aten::addmv": lambda out, matrix, vector, **_: matrix.numel(),
    "aten::dot": lambda a, b: a.numel(),
    "aten::vdot": lambda a, b: a.numel(),
    "aten::addr": lambda out, a, b, **_: a.numel() * b.numel(),
    "aten::addbmm": lambda out, a, b, **_: a.numel() * b.shape[-1],
    "aten::_int_mm": lambda a, b: a.numel() * b.shape[-1],
    "aten::_grouped_mm": lambda a, b, *_, **__: a.numel() * b.shape[-1],
    "aten::_scaled_grouped_mm": lambda a, b, *_, **__: a.numel() * b.shape[-1],
    "aten::_trilinear": _trilinear,
    "aten::mkldnn_rnn_layer": _mkldnn_rnn,
    "aten::_cudnn_rnn": _cudnn_rnn,
}

# Pointwise work of a recurrent cell by hidden unit: LSTM 4 sums, 5 nonlinearities, 3 products, 1 sum; GRU 4 sums and differences,
# 3 nonlinearities, 2 products, 1 sum; a plain one 1 sum, 1 nonlinearity. Keys: the mode numbers of ATen.
_CELL = {0: 2, 1: 2, 2: 13, 3: 10}


def _weighted(weight, whole=5):
    return whole if weight is not None else whole - 1


def _batch_norm(x, weight, bias, mean, variance, training, *_, **__):
    return x.numel() * (_weighted(weight) if training else 2)


def _legit_without_statistics(x, weight, bias, training, *_, **__):
    return x.numel() * _weighted(weight)


def _fixed_batch_norm(x, *_, **__):
    return x.numel() * 2


def _mkldnn_cell(sequence, w0, w1, w2, w3, hidden, cell, reverse, batch_sizes, mode, hidden_size, *_, **__):
    return _rows(sequence) * hidden_size * _CELL[mode]


def _cudnn_cell(sequence, weights, stride, buffer, hidden, cell, mode, hidden_size, projection, layers, batch_first, dropout, train,
                bidirectional, *_, **__):
    return _rows(sequence) * hidden_size * layers * (2 if bidirectional else 1) * _CELL[mode]


def _of_argument(x, *_, **__):
    return x.numel()


_OTHER = {
    "native_layer_norm": lambda x, shape, weight, *_, **__: x.numel() * _weighted(weight),
    "_fused_rms_norm": lambda x, shape, weight, *_, **__: x.numel() * _weighted(weight),
    "native_group_norm": lambda x, weight, *_, **__: x.numel() * _weighted(weight),
    "native_batch_norm": _batch_norm, "cudnn_batch_norm": _batch_norm, "_native_batch_norm_legit": _batch_norm,
    "_native_batch_norm_legit_no_training": _fixed_batch_norm, "_batch_norm_no_update": _fixed_batch_norm,
    "_batch_norm_with_update": lambda x, weight, *_, **__: x.numel() * _weighted(weight),
    "mkldnn_rnn_layer": _mkldnn_cell, "_cudnn_rnn": _cudnn_cell,
    "_thnn_fused_lstm_cell": lambda from_input, from_hidden, cell, *_, **__: cell.numel() * _CELL[2],
    "_thnn_fused_gru_cell": lambda from_input, from_hidden, hidden, *_, **__: hidden.numel() * _CELL[3],
    "native_dropout": lambda x, *_, **__: 2 * x.numel(),
}
_OTHER.update(dict.fromkeys(
    ("_softmax", "_log_softmax", "_safe_softmax", "sum", "mean", "prod", "amax", "amin", "var", "std", "var_mean", "std_mean", "norm",
     "linalg_vector_norm", "logsumexp", "cumsum", "cumprod", "max_pool2d_with_indices", "max_pool3d_with_indices", "avg_pool1d",
     "avg_pool2d", "avg_pool3d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d",
     "adaptive_max_pool3d"), _of_argument))
# Pointwise, but not marked so in ATen.
_POINTWISE = {"leaky_relu", "hardswish", "hardtanh", "hardsigmoid", "log_sigmoid_forward", "_prelu_kernel", "rrelu_with_noise", "glu",
              "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_linear1d", "upsample_bilinear2d",
              "upsample_trilinear3d", "upsample_bicubic2d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa"}
_FREE = {"clone", "masked_fill", "where", "positive"}
_SEVERAL = {"addcmul": 2, "addcdiv": 2, "lerp": 3}


def _first_tensor(out):
    return out[0] if isinstance(out, (tuple, list)) and out else out


def _per_element(func, name, out):
    """Pointwise work by the result's elements; 0 for what is no arithmetic of floating-point numbers."""
    out = _first_tensor(out)
    if not isinstance(out, torch.Tensor) or not (out.is_floating_point() or out.is_complex()):
        return 0
    if name in _FREE or not (name in _POINTWISE or torch.Tag.pointwise in func.tags):
        return 0
    return out.numel() * _SEVERAL.get(name, 1)


def _base_name(packet):
    """add of aten::add_."""
    name = packet._qualified_op_name.partition("::")[2]
    return name[:-1] if name.endswith("_") and not name.endswith("__") else name


def has_formula(func):
    packet = func._overloadpacket
    name = _base_name(packet)
    return (packet in flop_registry or packet._qualified_op_name in _MACS or name in _OTHER or name in _POINTWISE
            or torch.Tag.pointwise in func.tags)


def cost_of(func, args, kwargs, out):
    """Cost of one call of an ATen overload, or None if it has no formula and is not an ATen operation."""
    packet = func._overloadpacket
    full = packet._qualified_op_name
    formula = _MACS.get(full)
    if formula is not None:
        macs = formula(*args, **kwargs)
    elif packet in flop_registry:
        macs = flop_registry[packet](*args, **kwargs, out_val=out) // 2
    elif not full.startswith(("aten::", "prim::", "prims::", "profiler::", "c10d::", "_c10d_functional::")):
        return None
    else:
        macs = 0
    name = _base_name(packet)
    if name == "convolution":
        other = _first_tensor(out).numel() if len(args) > 2 and args[2] is not None else 0
    elif name in _OTHER:
        other = _OTHER[name](*args, **kwargs)
    else:
        other = _per_element(func, name, out)
    return Cost(macs, 2 * macs + other)
