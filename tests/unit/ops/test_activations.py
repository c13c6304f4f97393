# SPDX-License-Identifier: Apache-2.0
"""Fused activations on the CPU: accuracy beside plain torch, gradients, masks, tracing, threads, refusals."""
import pytest
import torch

from deepspeed.ops import activations
from deepspeed.ops._library import ops
from tests.unit.ops import activation_checks as checks
from tests.unit.ops.activation_checks import ACTS, DTYPES, FUSED, SHAPES

CPU = torch.device("cpu")


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_bias_act(dtype, act, shape, with_bias):
    checks.check_bias_act(CPU, dtype, act, shape, with_bias)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gated(dtype, act, shape):
    checks.check_gated(CPU, dtype, act, shape)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gated_halves(dtype, act, shape, with_bias):
    checks.check_gated_halves(CPU, dtype, act, shape, with_bias)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float_bias(dtype):
    checks.check_float_bias(CPU, dtype)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout_add(dtype, shape, p, with_bias):
    checks.check_dropout_add(CPU, dtype, shape, p, with_bias)


def test_layouts():
    checks.check_layouts(CPU)


def test_empty():
    checks.check_empty(CPU)


def test_mask():
    checks.check_mask(CPU)


def test_generator():
    checks.check_generator(CPU)


def test_operators_pass_opcheck():
    for op, arguments in checks.opcheck_arguments(CPU):
        torch.library.opcheck(op.default, arguments)


def test_evaluation_adds_plainly():
    x, residual = torch.randn(5, 6), torch.randn(5, 6)
    state = torch.get_rng_state()
    assert torch.equal(activations.dropout_add(x, residual, 0.5, training=False), residual + x)
    assert torch.equal(activations.FusedDropoutAdd(0.5).eval()(x, residual), residual + x)
    assert torch.equal(torch.get_rng_state(), state)


def test_fullgraph_compile_with_changing_shapes():
    bias = torch.randn(24, requires_grad=True)

    def block(x, residual):
        x = activations.bias_gelu(x, bias)
        x = activations.swiglu(torch.cat([x, x], -1))
        return activations.dropout_add(activations.geglu(x, x), residual, 0.25, bias=bias)

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (3, 8, 5):
        x, residual = torch.randn(rows, 24, requires_grad=True), torch.randn(rows, 24, requires_grad=True)
        outcomes = []
        for function in (block, compiled):
            torch.manual_seed(rows)
            out = function(x, residual)
            outcomes.append([out, *torch.autograd.grad(out.square().sum(), [x, residual, bias])])
        for a, b in zip(*outcomes, strict=True):
            assert torch.equal(a, b)


def every_result():
    outcomes = []
    for dtype in DTYPES:
        x, bias, residual = checks.inputs(0, CPU, dtype, (300, 514), (514,), (300, 514))
        grad = torch.ones(300, 514)
        outcomes += checks.results(activations.bias_gelu, [x, bias], grad)
        outcomes += checks.results(activations.bias_silu, [x], grad)
        outcomes += checks.results(lambda x, bias: activations.swiglu(x, bias=bias), [x, bias], grad[:, :257])
        torch.manual_seed(0)
        outcomes += checks.results(lambda x, r, bias: activations.dropout_add(x, r, 0.3, bias=bias), [x, residual, bias], grad)
    return outcomes


def test_threads_change_no_bit():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = every_result()
        torch.set_num_threads(2)
        two = every_result()
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_nothing_but_inputs_is_saved():
    x = torch.randn(4, 8, requires_grad=True)
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        activations.bias_gelu(x)
        activations.swiglu(x)
        activations.dropout_add(x, x, 0.5)
    assert all(t.data_ptr() == x.data_ptr() or t.dtype == torch.int64 and t.numel() == 2 for t in packed)


def test_second_derivatives_are_refused_not_wrong():
    x = torch.randn(4, 6, requires_grad=True)
    for function in (activations.bias_gelu, activations.swiglu, lambda t: activations.swiglu(t, t), lambda t: activations.dropout_add(t, t)):
        (grad,) = torch.autograd.grad(function(x).square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="not implemented"):
            grad.sum().backward()


def test_modules():
    x = torch.randn(3, 12)
    assert torch.equal(activations.FusedGELU(approximate="tanh")(x), FUSED["gelu_tanh"](x))
    module = activations.FusedSiLU(features=12, dtype=torch.float32)
    module.bias.data.normal_()
    assert torch.equal(module(x), activations.bias_silu(x, module.bias))
    assert torch.equal(activations.FusedReLU()(x), x.relu())
    assert torch.equal(activations.FusedSwiGLU()(x), activations.swiglu(*x.chunk(2, -1)))
    assert torch.equal(activations.FusedGeGLU("tanh")(x, x), activations.geglu(x, x, approximate="tanh"))
    assert torch.equal(activations.FusedReGLU()(x), activations.reglu(x))
    assert "features=12" in repr(module)


X, BIAS = torch.zeros(2, 6), torch.zeros(6)
REFUSED = {
    "x: dtype": lambda: activations.bias_gelu(X.double()),
    "bias has shape": lambda: activations.bias_gelu(X, torch.zeros(5)),
    "bias is": lambda: activations.bias_gelu(X, BIAS.half()),
    "bias: dtype": lambda: activations.bias_gelu(X, BIAS.long()),
    "approximate must": lambda: activations.bias_gelu(X, approximate="erf"),
    "act must": lambda: ops().bias_act(X, None, "mish"),
    "x must have a dimension": lambda: activations.bias_silu(torch.tensor(1.0), BIAS),
    "up has shape": lambda: activations.swiglu(X, X[:1]),
    "up is": lambda: activations.swiglu(X, X.half()),
    "two halves": lambda: activations.swiglu(X[:, :3]),
    "bias goes with one": lambda: activations.swiglu(X, X, bias=BIAS),
    "grad has shape": lambda: ops().bias_act_backward(X[:1], X, None, "gelu"),
    "grad is": lambda: ops().gated_halves_backward(X[:, :3].half(), X, None, "gelu"),
    "residual has shape": lambda: activations.dropout_add(X, X[0]),
    "p must lie": lambda: activations.dropout_add(X, X, 1.5),
    "p must lie in": lambda: activations.FusedDropoutAdd(-0.5),
    "state must be two": lambda: ops().dropout_add(X, X, None, 0.5, torch.zeros(3, dtype=torch.int64)),
}


@pytest.mark.parametrize("said", REFUSED)
def test_refuses_by_name(said):
    with pytest.raises(ValueError, match=said):
        REFUSED[said]()


def test_dropout_under_vmap_has_one_mask_or_is_refused():
    x = torch.ones(4, 256)
    module = activations.FusedDropoutAdd(0.5)
    masks = torch.vmap(lambda row: module(row, torch.zeros(256)), randomness="same")(x) == 0
    assert 64 < masks[0].sum() < 192 and torch.equal(masks, masks[:1].expand(4, -1))
    for randomness in ("error", "different"):
        for depth in (lambda f: f, lambda f: torch.vmap(f, in_dims=0, randomness="same")):  # the inner vmap's is not all that counts
            with pytest.raises(RuntimeError, match=f"dropout_add under vmap.randomness='{randomness}'"):
                torch.vmap(depth(lambda row: module(row, torch.zeros_like(row))), randomness=randomness)(x.reshape(2, 2, 256))
    assert torch.equal(torch.vmap(lambda row: module.eval()(row, row))(x), 2 * x)


@pytest.mark.filterwarnings("ignore:Dynamo does not know")
def test_dropout_under_a_compiled_vmap_has_one_mask_or_is_refused():
    x = torch.ones(2, 256)

    def masks(randomness):
        def function(x):
            return torch.vmap(lambda row: activations.dropout_add(row, torch.zeros_like(row)), randomness=randomness)(x)
        return torch.compile(function, backend="eager", fullgraph=randomness == "same")(x) == 0

    same = masks("same")
    assert 64 < same[0].sum() < 192 and torch.equal(same[0], same[1])
    with pytest.raises(RuntimeError, match="dropout_add under vmap.randomness='different'"):
        masks("different")
