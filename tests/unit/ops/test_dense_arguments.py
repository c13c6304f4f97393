# SPDX-License-Identifier: Apache-2.0
"""Sparse, quantized, nested and MKL-DNN tensors are refused by the argument's name, whichever operator and argument."""
import warnings

import pytest
import torch

from deepspeed.ops._library import ops
from deepspeed.ops.activations import bias_gelu, bias_silu, dropout_add, swiglu
from deepspeed.ops.cross_entropy import cross_entropy, linear_cross_entropy
from deepspeed.ops.multi_tensor import squared_norm
from deepspeed.ops.normalization import layer_norm, rms_norm
from deepspeed.ops.quantizer import quantize
from deepspeed.ops.rope import RotaryEmbedding, apply_rotary
from deepspeed.ops.softmax import scaled_masked_softmax

DENSE, VECTOR, LABELS, HEADS = torch.ones(4, 8), torch.ones(8), torch.arange(4), torch.ones(2, 3, 4, 8)


def undense(like):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch: "in beta", "prototype"
        yield "sparse", like.to_sparse()
        if like.dim() == 2:
            yield "sparse_csr", like.to_sparse_csr()
        yield "nested", torch.nested.nested_tensor([like, like])
        yield "jagged", torch.nested.nested_tensor([like, like], layout=torch.jagged)
        if like.is_floating_point():
            yield "quantized", torch.quantize_per_tensor(like, 0.1, 0, torch.qint8)
            yield "mkldnn", like.to_mkldnn()


FACES = {
    ("layer_norm", "x"): (lambda t: layer_norm(t, 8, VECTOR), DENSE), ("layer_norm", "weight"): (lambda t: layer_norm(DENSE, 8, t), VECTOR),
    ("layer_norm", "bias"): (lambda t: layer_norm(DENSE, 8, VECTOR, t), VECTOR),
    ("layer_norm", "residual"): (lambda t: layer_norm(DENSE, 8, residual=t), DENSE),
    ("rms_norm", "x"): (lambda t: rms_norm(t), DENSE), ("rms_norm", "weight"): (lambda t: rms_norm(DENSE, t), VECTOR),
    ("softmax", "x"): (lambda t: scaled_masked_softmax(t), DENSE), ("softmax", "mask"): (lambda t: scaled_masked_softmax(DENSE, t), DENSE),
    ("gelu", "x"): (lambda t: bias_gelu(t), DENSE), ("silu", "bias"): (lambda t: bias_silu(DENSE, t), VECTOR),
    ("swiglu", "gate"): (lambda t: swiglu(t, DENSE), DENSE), ("swiglu", "up"): (lambda t: swiglu(DENSE, t), DENSE),
    ("swiglu of halves", "x"): (lambda t: swiglu(t), DENSE),
    ("dropout_add", "x"): (lambda t: dropout_add(t, DENSE), DENSE), ("dropout_add", "residual"): (lambda t: dropout_add(DENSE, t), DENSE),
    ("cross_entropy", "logits"): (lambda t: cross_entropy(t, LABELS), DENSE),
    ("cross_entropy", "labels"): (lambda t: cross_entropy(DENSE, t), LABELS),
    ("linear_cross_entropy", "hidden"): (lambda t: linear_cross_entropy(t, DENSE, LABELS), DENSE),
    ("linear_cross_entropy", "weight"): (lambda t: linear_cross_entropy(DENSE, t, LABELS), DENSE),
    ("rope", "q"): (lambda t: apply_rotary(t, HEADS, DENSE, DENSE), HEADS), ("rope", "k"): (lambda t: apply_rotary(HEADS, t, DENSE, DENSE), HEADS),
    ("rope", "cos"): (lambda t: apply_rotary(HEADS, HEADS, t, DENSE[:, :4]), DENSE[:, :4]),
    ("rotary module", "q"): (lambda t: RotaryEmbedding(8)(t, HEADS), HEADS),
    ("quantize", "x"): (lambda t: quantize(t, "int8", 8), DENSE),
}


@pytest.mark.parametrize("face, argument", FACES)
@pytest.mark.parametrize("needs_grad", [False, True])
def test_faces_name_the_argument(face, argument, needs_grad):
    call, like = FACES[face, argument]
    for kind, odd in undense(like):
        if needs_grad and odd.is_floating_point() and kind != "quantized" and argument != "cos":
            odd.requires_grad_()
        with pytest.raises(ValueError, match=f"^{argument} must be a dense tensor, (its layout|it is)"):
            call(odd)


def test_every_operator_has_the_check():
    """Also those of gradients, and of lists."""
    arguments = {"Tensor": DENSE.to_sparse(), "List[Tensor]": [DENSE, DENSE.to_sparse()], "Optional[Tensor]": None, "int": 1, "float": 1.0,
                 "bool": True, "str": "gelu", "List[int]": [4, 8], "List[bool]": [True] * 3, **dict.fromkeys(["Optional[int]", "Optional[str]", "Optional[bool]"])}
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("deepspeed::")]
    assert len(names) > 25
    for name in names:
        op = getattr(ops(), name.split("::")[1]).default
        values = [arguments[str(a.type)] for a in op._schema.arguments]
        with pytest.raises(ValueError, match=r"^\w+(\[1\])? must be a dense tensor, its layout is Sparse"):
            op(*values)


def test_sparse_gradients_name_the_argument():
    x = DENSE.clone().requires_grad_()
    with pytest.raises(ValueError, match="^grad must be a dense tensor"):
        ops().bias_act_backward(DENSE.to_sparse(), x, None, "gelu")


def test_lists_of_tensors():
    for kind, odd in undense(DENSE):
        with pytest.raises(ValueError, match=r"^tensors\[1\]"):
            squared_norm([DENSE, odd])


@pytest.mark.parametrize("face, argument", [case for case in FACES if case not in {
    ("rotary module", "q"), ("rope", "q"), ("rope", "k"), ("swiglu", "up"), ("swiglu", "gate"), ("layer_norm", "weight"), ("layer_norm", "bias"),
    ("layer_norm", "residual"), ("rms_norm", "weight"), ("softmax", "mask"), ("silu", "bias")}])  # where None has a meaning, or shifts the blame
def test_none_in_the_place_of_a_tensor(face, argument):
    with pytest.raises(ValueError, match=f"^{argument} must be a tensor, not None"):
        FACES[face, argument][0](None)


def test_none_in_the_place_of_one_of_two_halves():
    with pytest.raises(ValueError, match="^gate must be a tensor, not None"):
        swiglu(None, DENSE)
    with pytest.raises(ValueError, match="^x must be a tensor, not None"):
        swiglu(None)


@pytest.mark.parametrize("call, argument", [(lambda: cross_entropy([1.0], LABELS), "logits"), (lambda: cross_entropy(DENSE, [0, 1]), "labels"),
                                            (lambda: linear_cross_entropy(DENSE, 3, LABELS), "weight"), (lambda: layer_norm(DENSE, 8, [1.0]), "weight"),
                                            (lambda: quantize([1.0]), "x"), (lambda: dropout_add(2.0, DENSE), "x")])
def test_what_is_no_tensor_is_named(call, argument):
    with pytest.raises(ValueError, match=f"^{argument} must be a tensor, not (list|int|float)"):
        call()
