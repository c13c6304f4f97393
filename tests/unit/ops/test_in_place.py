# SPDX-License-Identifier: Apache-2.0
"""Backwards that overwrite the gradient they are given: the same bits as without, and never what somebody else holds. tests/gpu runs these on a GPU."""
from collections import namedtuple

import pytest
import torch

from deepspeed.ops._library import ops
from deepspeed.ops.activations import bias_gelu, swiglu
from deepspeed.ops.normalization import layer_norm, rms_norm
from deepspeed.ops.rope import apply_rotary
from deepspeed.ops.softmax import scaled_masked_softmax

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(3, 20), (2, 33, 70), (5, 5000), (1, 2, 20000)]


@pytest.fixture
def device():
    return "cpu"


# A function and its operators: `backward(grads, device, dtype)` gives the arguments behind the gradients that the operators share; the results
# of the one in place, behind those it writes into the gradients, are those of the other.
Case = namedtuple("Case", "forward inputs operator backward")


def _random(*shape, device, dtype):
    return (2 * torch.randn(shape)).to(device, dtype)


def _softmax(shape, device, dtype):
    y = torch.softmax(_random(*shape, device=device, dtype=torch.float32), -1).to(dtype)
    return Case(lambda x: scaled_masked_softmax(x, scale=0.5), [_random(*shape, device=device, dtype=dtype)], "scaled_masked_softmax_backward", (y, 0.5, False))


def _layer_norm(shape, device, dtype, residual=False):
    columns, leading = shape[-1], shape[:-1]
    weight, bias = (_random(columns, device=device, dtype=dtype) for _ in range(2))
    h, dh = _random(*shape, device=device, dtype=dtype), _random(*shape, device=device, dtype=dtype) if residual else None
    mean, rstd = (torch.rand(leading, device=device) + 0.5 for _ in range(2))
    return Case(lambda x: layer_norm(x, columns, weight, bias), [h], "layer_norm_backward", (dh, h, weight, mean, rstd, dtype))


def _rms_norm(shape, device, dtype):
    weight, h = _random(shape[-1], device=device, dtype=dtype), _random(*shape, device=device, dtype=dtype)
    rstd = torch.rand(shape[:-1], device=device) + 0.5
    return Case(lambda x: rms_norm(x, weight, 1e-6), [h], "rms_norm_backward", (None, h, weight, rstd, 1.0, None))


def _bias_gelu(shape, device, dtype):
    x, bias = _random(*shape, device=device, dtype=dtype), _random(shape[-1], device=device, dtype=dtype)
    return Case(lambda x: bias_gelu(x, bias), [x], "bias_act_backward", (x, bias, "gelu"))


def _swiglu(shape, device, dtype):
    gate, up = (_random(*shape, device=device, dtype=dtype) for _ in range(2))
    return Case(swiglu, [gate, up], "gated_backward", (gate, up, "silu"))


CASES = {
    "softmax": _softmax, "layer norm": _layer_norm, "layer norm, residual": lambda *a: _layer_norm(*a, residual=True), "RMS norm": _rms_norm,
    "bias + GELU": _bias_gelu, "SwiGLU": _swiglu,
}


def _flat(result):
    return [result] if isinstance(result, torch.Tensor) else [t for t in result or () if t is not None]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_same_bits(device, name, dtype, shape):
    torch.manual_seed(0)
    case, grad = CASES[name](shape, device, dtype), _random(*shape, device=device, dtype=dtype)
    kept, version, address = grad.clone(), grad._version, grad.data_ptr()
    want = _flat(getattr(ops(), case.operator)(kept, *case.backward))
    got = _flat(getattr(ops(), case.operator + "_")(grad, *case.backward))
    assert grad._version > version and grad.data_ptr() == address
    assert len(want) == 1 + len(got)
    for a, b in zip(want, [grad, *got]):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", CASES)
def test_refused(device, name):
    case = CASES[name]((4, 6), device, torch.float32)
    backward = getattr(ops(), case.operator + "_")
    with pytest.raises(ValueError, match="must be contiguous to be overwritten"):
        backward(torch.randn(6, 4, device=device).t(), *case.backward)
    shared = next(t for t in case.backward if isinstance(t, torch.Tensor) and t.shape == (4, 6))
    with pytest.raises(ValueError, match="must not overlap another argument"):
        backward(shared, *case.backward)
    with pytest.raises(ValueError, match="has shape"):
        backward(torch.randn(4, 5, device=device), *case.backward)


@pytest.mark.parametrize("name", CASES)
def test_opcheck(device, name):
    case = CASES[name]((4, 6), device, torch.float32)
    torch.library.opcheck(getattr(ops(), case.operator + "_").default, (torch.randn(4, 6, device=device), *case.backward))


def _rotary(device, dtype, layout="bshd"):
    """With fewer heads of k, and a part of each head that is not rotated."""
    angles = torch.rand(9, 4, device=device)
    q, k = (_random(2, 9, heads, 10, device=device, dtype=dtype) for heads in (3, 1))
    if layout == "bhsd":
        q, k = q.transpose(1, 2), k.transpose(1, 2)
    return Case(lambda q, k: apply_rotary(q, k, angles.cos(), angles.sin(), layout=layout, rotary_dim=8), [q, k], "rope",
                (angles.cos(), angles.sin(), None, 8, False, layout == "bhsd", True))


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rotary_same_bits(device, dtype, layout):
    case = _rotary(device, dtype, layout)
    want = ops().rope(*case.inputs, *case.backward)
    ops().rope_(*case.inputs, *case.backward)
    assert all(torch.equal(a, b) for a, b in zip(want, case.inputs))


def test_rotary_refused(device):
    case = _rotary(device, torch.float32)
    q, k = case.inputs
    for bad, message in (((q, q), "k overlaps q"), ((q, q[:, :, :1]), "k overlaps q|k must be dense"), ((q.transpose(-1, -2), k), "k has shape"),
                         ((torch.randn(2, 9, 10, 3, device=device).transpose(-1, -2), k), "q must be dense")):
        before = q.clone()
        with pytest.raises(ValueError, match=message):
            ops().rope_(*bad, *case.backward)
        assert torch.equal(q, before)


def test_rotary_opcheck(device):
    case = _rotary(device, torch.float32)
    torch.library.opcheck(ops().rope_.default, (*case.inputs, *case.backward))


def _overwrites(operator, loss):
    """Whether backward took the gradient's memory."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        loss.backward()
    names = {event.name.removeprefix("deepspeed::") for event in seen.events()} & {operator, operator.removesuffix("_")}
    return operator in names


@pytest.mark.parametrize("name", [*CASES, "rotary"])
def test_only_what_nobody_holds(device, name):
    """A gradient of a model's middle is overwritten; what a caller, a hook or retain_grad holds, or what is to be differentiated, is not."""
    case = _rotary(device, torch.float32) if name == "rotary" else CASES[name]((40, 64), device, torch.float32)
    operator = "rope_" if name == "rotary" else case.operator + "_"
    weights = None

    def run(watch=lambda y: None, takers=1):
        nonlocal weights
        leaves = [t.detach().clone().requires_grad_() for t in case.inputs]
        outputs = _flat(case.forward(*leaves))
        weights = weights or [torch.randn_like(y) for y in outputs]
        for y in outputs:
            watch(y)
        loss = sum((y * w).sum() for y, w in zip(outputs, weights) for _ in range(takers))
        return _overwrites(operator, loss), leaves, outputs

    held = []
    taken, once, _ = run()
    assert taken
    taken, twice, _ = run(takers=2)
    assert taken
    for a, b in zip(once, twice):
        torch.testing.assert_close(2 * a.grad, b.grad)
    taken, leaves, _ = run(lambda y: y.register_hook(held.append))
    assert not taken and sum(torch.equal(g, w) for g in held for w in weights) == len(weights)
    taken, retained, outputs = run(lambda y: y.retain_grad())
    assert all(torch.equal(y.grad, w) for y, w in zip(outputs, weights))
    for a, b, c in zip(once, leaves, retained):
        assert torch.equal(a.grad, b.grad) and torch.equal(a.grad, c.grad)

    leaves = [t.detach().clone().requires_grad_() for t in case.inputs]
    outputs, grads = _flat(case.forward(*leaves)), [w.clone() for w in weights]
    for _ in range(2):
        again = torch.autograd.grad(outputs, leaves, grads, retain_graph=True)
        assert all(torch.equal(a, b.grad) for a, b in zip(again, once))
    assert all(torch.equal(g, w) for g, w in zip(grads, weights))


@pytest.mark.parametrize("name", CASES)
def test_gradients_of_other_shapes(device, name):
    """A linear layer or a matmul flattens what it is given, so the gradient is a view of one that is flat."""
    case = CASES[name]((2, 30, 64), device, torch.float32)
    weight, held = torch.randn(64, 16, device=device), []

    def run(then):
        leaves = [t.detach().clone().requires_grad_() for t in case.inputs]
        (y,) = _flat(case.forward(*leaves))
        return _overwrites(case.operator + "_", then(y).sum()), [t.grad for t in leaves]

    def flattened(y):
        z = y.view(60, 64)
        z.register_hook(held.append)
        return z @ weight

    want = torch.autograd.grad((_flat(case.forward(*case.inputs[:-1], case.inputs[-1].requires_grad_()))[0] * weight.sum(1)).sum(), case.inputs[-1])[0]
    for then, expected in ((lambda y: y @ weight, True), (lambda y: torch.nn.functional.linear(y, weight.t()), True), (flattened, False),
                           (lambda y: y.transpose(0, 1).contiguous() @ weight, False)):
        taken, grads = run(then)
        assert taken == expected
        torch.testing.assert_close(grads[-1], want)
    torch.testing.assert_close(held[0], weight.sum(1).expand(60, 64))


@pytest.mark.parametrize("name", [*CASES, "rotary"])
def test_memory_of_a_backward(device, name):
    """The operator in place allocates no gradient that it does not return besides, by what the CPU's allocator gave."""
    case = _rotary(device, torch.float32) if name == "rotary" else CASES[name]((64, 4096), device, torch.float32)
    leaves = [t.detach().clone().requires_grad_() for t in case.inputs]
    loss = sum((y * 1.5).sum() for y in _flat(case.forward(*leaves)))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
        loss.backward()
    operator = "rope_" if name == "rotary" else case.operator + "_"
    (event,) = [e for e in seen.events() if e.name == "deepspeed::" + operator]
    largest = max(t.nbytes for t in leaves)
    assert event.cpu_memory_usage <= (len(leaves) - 1) * largest * (name != "rotary") + largest // 4
