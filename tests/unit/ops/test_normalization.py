# SPDX-License-Identifier: Apache-2.0
"""The fused norms against torch's in float64: every element errs at most twice as much as torch does at that dtype (by its largest error), or
by one rounding of the largest value. Gradients of x are differences of terms, which cancel in rows of one column: each is a product of four
factors rounded to float32, and those roundings are allowed too."""
import pytest
import torch
import torch.nn.functional as F

from deepspeed.ops._library import ops
from deepspeed.ops.normalization import FusedLayerNorm, FusedRMSNorm, layer_norm, rms_norm

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
COLUMNS = [1, 2, 15, 16, 17, 130, 768, 4099]


def gemma_norm(h, weight, eps):
    return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps) * (1 + weight)


def fused(kind, x, residual, weight, bias):
    shape = (x.shape[-1],)
    out = layer_norm(x, shape, weight, bias, residual=residual) if kind == "layer" else rms_norm(x, weight, residual=residual)
    return out if residual is not None else (out,)


def plain(kind, x, residual, weight, bias):
    h = x if residual is None else x + residual
    y = F.layer_norm(h, (x.shape[-1],), weight, bias, 1e-5) if kind == "layer" else F.rms_norm(h, (x.shape[-1],), weight, 1e-6)
    return (y,) if residual is None else (y, h)


def random(*shape, seed, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def results(way, kind, tensors, grads, dtype=None):
    """Outputs and gradients; `tensors` are x, residual, weight, bias, or None."""
    tensors = [None if t is None else t.detach().to(dtype or t.dtype).requires_grad_() for t in tensors]
    outputs = way(kind, *tensors)
    leaves = [t for t in tensors if t is not None]
    return [*outputs, *torch.autograd.grad(outputs, leaves, [g.to(dtype or g.dtype) for g in grads])]


def assert_no_worse(ours, peer, exact, what, term=0.0):
    assert ours.dtype == peer.dtype and ours.shape == peer.shape, what
    bound = 2 * (peer.double() - exact).abs().max() + torch.finfo(ours.dtype).eps / 2 * exact.abs().max() + 4 * 2**-24 * term
    error = (ours.double() - exact).abs().max()
    assert error <= bound, f"{what}: error {error:.3g}, allowed {bound:.3g}"


def largest_term(kind, tensors, dy):
    """The largest |dy * weight| / deviation: dx is made of such terms."""
    x, residual, weight, _ = (None if t is None else t.double() for t in tensors)
    h = x if residual is None else x + residual
    power = h.var(-1, correction=0) + 1e-5 if kind == "layer" else h.square().mean(-1) + 1e-6
    grad = dy.double() if weight is None else dy * weight
    return (grad.abs().amax(-1) * power.rsqrt()).max().item()


def compare(kind, tensors, grads):
    term, outputs = largest_term(kind, tensors, grads[0]), len(grads)
    for i, (ours, peer, exact) in enumerate(zip(results(fused, kind, tensors, grads), results(plain, kind, tensors, grads),
                                                results(plain, kind, tensors, grads, torch.float64))):
        assert_no_worse(ours.detach(), peer.detach(), exact.detach(), f"result {i}", term if outputs <= i < 2 * outputs else 0.0)


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_as_accurate_as_torch(kind, residual, dtype, columns):
    def make(seed):
        return random(3, 11, columns, seed=seed, dtype=dtype)
    vectors = [1 + random(columns, seed=7, dtype=dtype), random(columns, seed=8, dtype=dtype) if kind == "layer" else None]
    compare(kind, [make(1), make(2) if residual else None, *vectors], [make(3), make(4)] if residual else [make(3)])


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_many_rows_and_no_parameters(kind):
    x, dy = random(5000, 24, seed=1), random(5000, 24, seed=2)
    compare(kind, [x, None, random(24, seed=3), random(24, seed=4) if kind == "layer" else None], [dy])
    compare(kind, [x, None, None, None], [dy])


@pytest.mark.parametrize("kind,weight,bias", [("layer", True, False), ("layer", False, True), ("rms", True, False)])
def test_only_one_of_weight_and_bias(kind, weight, bias):
    compare(kind, [random(9, 40, seed=1), None, random(40, seed=2) if weight else None, random(40, seed=3) if bias else None],
            [random(9, 40, seed=4)])


def test_rows_far_from_zero():
    """Means of 1e4 and deviations of 1; torch rounds the mean to 2^-10 and is held to its own error, we to a hundredth of that spacing."""
    x = (1e4 + random(16, 1000, seed=1)).float()
    exact = F.layer_norm(x.double(), (1000,))
    ours, torchs = layer_norm(x, 1000), F.layer_norm(x, (1000,))
    assert_no_worse(ours, torchs, exact, "y")
    assert (ours.double() - exact).abs().max() < 1e-5
    wide = random(16, 1000, seed=2)
    compare("layer", [x, None, None, None], [wide])


def test_one_cluster_of_outliers_at_the_start_of_a_row():
    x = random(4, 16384, seed=1)
    x[:, :64] += 3e4
    exact = F.layer_norm(x.double(), (16384,))
    assert_no_worse(layer_norm(x, 16384), F.layer_norm(x, (16384,)), exact, "y")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_float32_parameters_of_narrow_rows(kind, dtype):
    x, dy = random(12, 96, seed=1, dtype=dtype), random(12, 96, seed=2, dtype=dtype)
    vectors = [1 + random(96, seed=3), random(96, seed=4) if kind == "layer" else None]
    ours = results(fused, kind, [x, None, *vectors], [dy])
    exact = results(plain, kind, [x, None, *vectors], [dy], torch.float64)
    for i, (mine, want) in enumerate(zip(ours, exact)):
        assert mine.dtype == (dtype if i < 2 else torch.float32)
        # one rounding of the result, and a few of float32 in a sum of 12 rows
        bound = torch.finfo(mine.dtype).eps * (1 if i < 2 else 16) * want.abs().max()
        assert (mine.double() - want).abs().max() <= bound, i


def test_weight_offset_is_gemmas_norm():
    x, weight, dy = random(6, 64, seed=1), 0.1 * random(64, seed=2), random(6, 64, seed=3)
    ours, exact = [], []
    for dtype, out in ((torch.float32, ours), (torch.float64, exact)):
        a, w = x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
        y = rms_norm(a, w, 1e-6, weight_offset=1.0) if out is ours else gemma_norm(a, w, 1e-6)
        out += [y, *torch.autograd.grad(y, [a, w], dy.to(dtype))]
    for mine, want in zip(ours, exact):
        torch.testing.assert_close(mine.double(), want, rtol=1e-6, atol=4e-6)


def test_several_normalized_dimensions():
    x = random(5, 3, 4, 6, seed=1).requires_grad_()
    weight, bias = (random(4, 6, seed=s).requires_grad_() for s in (2, 3))
    y, h = layer_norm(x, (4, 6), weight, bias, residual=x.detach())
    want = F.layer_norm(x + x.detach(), (4, 6), weight, bias)
    torch.testing.assert_close(y, want)
    torch.testing.assert_close(h, 2 * x)
    dy = random(5, 3, 4, 6, seed=4)
    for ours, torchs in zip(torch.autograd.grad(y, [x, weight, bias], dy), torch.autograd.grad(want, [x, weight, bias], dy)):
        assert ours.shape == torchs.shape
        torch.testing.assert_close(ours, torchs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rms_norm(x, weight), F.rms_norm(x, (4, 6), weight, 1e-6))
    torch.testing.assert_close(rms_norm(x, normalized_shape=(4, 6)), F.rms_norm(x, (4, 6), None, 1e-6))


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_only_the_residual_stream_is_used(kind):
    x, residual, weight = (random(*s, seed=i).requires_grad_() for i, s in enumerate([(4, 8), (4, 8), (8,)]))
    _, h = fused(kind, x, residual, weight, None)
    assert torch.equal(h, x + residual)
    dh = random(4, 8, seed=9)
    dx, dresidual, dweight = torch.autograd.grad(h, [x, residual, weight], dh, allow_unused=True)
    assert torch.equal(dx, dh) and torch.equal(dresidual, dh) and dweight is None


def test_frozen_parameters_and_frozen_input():
    x, weight, bias, dy = random(7, 20, seed=1), random(20, seed=2), random(20, seed=3), random(7, 20, seed=4)
    full = results(fused, "layer", [x, None, weight, bias], [dy])
    only_x = x.clone().requires_grad_()
    assert torch.equal(torch.autograd.grad(layer_norm(only_x, 20, weight, bias), only_x, dy)[0], full[1])
    only_bias = bias.clone().requires_grad_()
    assert torch.equal(torch.autograd.grad(layer_norm(x, 20, weight, only_bias), only_bias, dy)[0], full[3])
    assert not layer_norm(x, 20, weight, bias).requires_grad


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_non_contiguous_arguments(kind):
    x, residual, dy = (random(6, 50, seed=s).t()[::2] for s in (1, 2, 3))
    weight = random(12, seed=4)[::2]
    dh = torch.ones(()).expand(25, 6)
    strided = results(fused, kind, [x, residual, weight, None], [dy, dh])
    dense = results(fused, kind, [t.contiguous() for t in (x, residual, weight)] + [None], [dy.contiguous(), dh.contiguous()])
    for a, b in zip(strided, dense):
        assert torch.equal(a, b)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (2, 0, 5), (0,)])
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_empty(kind, shape):
    x = torch.zeros(shape, requires_grad=True)
    weight, bias = (torch.ones(shape[-1:], requires_grad=True) for _ in range(2))
    y, h = fused(kind, x, x, weight, bias)
    assert y.shape == h.shape == shape
    (y.sum() + h.sum()).backward()
    assert x.grad.shape == shape and torch.equal(weight.grad, torch.zeros_like(weight))


@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("shape", [(3000, 48), (40, 5000), (7,)])
def test_threads_change_no_bit(kind, shape):
    bias = random(shape[-1], seed=4) if kind == "layer" else None
    tensors = [random(*shape, seed=1), random(*shape, seed=2), random(shape[-1], seed=3), bias]
    grads = [random(*shape, seed=5), random(*shape, seed=6)]
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            runs.append(results(fused, kind, tensors, grads))
    finally:
        torch.set_num_threads(before)
    for other in runs[1:]:
        for a, b in zip(runs[0], other):
            assert torch.equal(a, b)


def operators():
    library = ops()
    x, residual, weight, bias = (random(*s, seed=i) for i, s in enumerate([(2, 3, 20), (2, 3, 20), (20,), (20,)]))
    layer, rms = library.layer_norm(x, weight, bias, 1e-5), library.rms_norm(x, weight, 1e-6, 1.0)
    leaf = lambda t: t.clone().requires_grad_()  # noqa: E731
    return {
        "layer_norm": (library.layer_norm, (leaf(x), leaf(weight), leaf(bias), 1e-5)),
        "layer_norm plain": (library.layer_norm, (leaf(x), None, None, 1e-5)),
        "layer_norm_residual": (library.layer_norm_residual, (leaf(x), leaf(residual), leaf(weight), leaf(bias), 1e-5)),
        "layer_norm_backward": (library.layer_norm_backward, (residual, None, x, weight, *layer[1:], torch.bfloat16)),
        "layer_norm_backward frozen": (library.layer_norm_backward, (residual, residual, x, None, *layer[1:], None)),
        "rms_norm": (library.rms_norm, (leaf(x), leaf(weight), 1e-6, 1.0)),
        "rms_norm_residual": (library.rms_norm_residual, (leaf(x.bfloat16()), leaf(residual.bfloat16()), leaf(weight), 1e-6, 0.0)),
        "rms_norm_backward": (library.rms_norm_backward, (residual, residual, x, weight, rms[1], 1.0, torch.float32)),
        "rms_norm_backward frozen": (library.rms_norm_backward, (residual, None, x, None, rms[1], 0.0, None)),
    }


@pytest.mark.parametrize("name", operators())
def test_opcheck(name):
    operator, arguments = operators()[name]
    torch.library.opcheck(operator, arguments)


def test_compiles_as_one_graph_with_dynamic_shapes():
    def block(x, residual, weight, bias):
        y, h = layer_norm(x, x.shape[-1], weight, bias, residual=residual)
        y, h = rms_norm(torch.tanh(y), weight, residual=h)
        return y.sin().sum() + h.square().sum()

    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (4, 9):
        leaves = [random(*s, seed=i).requires_grad_() for i, s in enumerate([(rows, 32), (rows, 32), (32,), (32,)])]
        got, want = (torch.autograd.grad(f(*leaves), leaves) for f in (compiled, block))
        for a, b in zip(got, want):
            torch.testing.assert_close(a, b)


def test_gradients_of_gradients_are_refused():
    x = random(3, 8, seed=1).requires_grad_()
    for y in (layer_norm(x, 8), rms_norm(x)):
        grad, = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        with pytest.raises(NotImplementedError, match="second derivative"):
            grad.sum().backward()


@pytest.mark.parametrize("ours,theirs", [
    (lambda: FusedLayerNorm(12), lambda: torch.nn.LayerNorm(12)),
    (lambda: FusedLayerNorm((3, 4), eps=1e-3, bias=False), lambda: torch.nn.LayerNorm((3, 4), eps=1e-3, bias=False)),
    (lambda: FusedLayerNorm([12], elementwise_affine=False), lambda: torch.nn.LayerNorm([12], elementwise_affine=False)),
    (lambda: FusedRMSNorm(12), lambda: torch.nn.RMSNorm(12)),
    (lambda: FusedRMSNorm((3, 4), eps=1e-3), lambda: torch.nn.RMSNorm((3, 4), eps=1e-3)),
    (lambda: FusedRMSNorm(12, elementwise_affine=False), lambda: torch.nn.RMSNorm(12, elementwise_affine=False)),
])
def test_modules_stand_in_for_torchs(ours, theirs):
    ours, theirs = ours(), theirs()
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for p in theirs.parameters():
        torch.nn.init.normal_(p)
    ours.load_state_dict(theirs.state_dict())
    assert ours.normalized_shape == theirs.normalized_shape and ours.eps == theirs.eps
    assert repr(ours).split("(", 1)[1].startswith(repr(theirs).split("(", 1)[1].split(", bias")[0].rstrip(")"))
    x = random(5, *theirs.normalized_shape, seed=1)
    torch.testing.assert_close(ours(x), theirs(x))
    y, h = ours(x, residual=x)
    torch.testing.assert_close(y, theirs(x + x))
    assert torch.equal(h, x + x)


def test_modules_of_other_dtypes():
    assert FusedLayerNorm(4, dtype=torch.bfloat16)(random(2, 4, seed=1, dtype=torch.bfloat16)).dtype == torch.bfloat16
    gemma = FusedRMSNorm(4, eps=1e-6, weight_offset=1.0)
    assert torch.equal(gemma.weight, torch.zeros(4))
    x = random(2, 4, seed=1)
    torch.testing.assert_close(gemma(x), F.rms_norm(x, (4,), None, 1e-6))
    torch.testing.assert_close(FusedRMSNorm(4, eps=1e-6, elementwise_affine=False, weight_offset=1.0)(x), F.rms_norm(x, (4,), None, 1e-6))


X = torch.zeros(2, 8)
BAD = [
    (lambda: layer_norm(X.double(), 8), "x: dtype"),
    (lambda: layer_norm(X.long(), 8), "x: dtype"),
    (lambda: layer_norm([1.0], 1), "x must be a tensor"),
    (lambda: layer_norm(X, 7), "x has shape"),
    (lambda: layer_norm(torch.zeros(()), 1), "x has shape"),
    (lambda: layer_norm(X, ()), "normalized_shape"),
    (lambda: layer_norm(X, 8, torch.zeros(7)), "weight has shape"),
    (lambda: layer_norm(X, 8, torch.zeros(8), torch.zeros(1, 8)), "bias has shape"),
    (lambda: layer_norm(X, 8, torch.zeros(8, dtype=torch.bfloat16)), "weight is"),
    (lambda: layer_norm(X.half(), 8, torch.zeros(8), torch.zeros(8).half()), "bias is"),
    (lambda: layer_norm(X, 8, residual=torch.zeros(2, 1)), "residual has shape"),
    (lambda: layer_norm(X, 8, residual=X.half()), "residual is"),
    (lambda: layer_norm(X, 8, residual=3), "residual must be a tensor"),
    (lambda: layer_norm(X, 8, residual=X.to("meta")), "residual lies on"),
    (lambda: layer_norm(X, 8, eps=-1.0), "eps"),
    (lambda: rms_norm(X.to_sparse()), "x must be a dense"),
    (lambda: rms_norm(X, torch.zeros(4, dtype=torch.int32)), "x has shape"),
    (lambda: rms_norm(X, torch.zeros(8, dtype=torch.int32)), "weight: dtype"),
    (lambda: rms_norm(X, torch.zeros(8, device="meta")), "weight lies on"),
    (lambda: rms_norm(X, normalized_shape=[2, 8], weight=torch.zeros(8)), "weight has shape"),
    (lambda: ops().rms_norm_backward(X, None, X, None, torch.zeros(3), 0.0, None), "rstd has shape"),
    (lambda: ops().rms_norm_backward(X, None, X, None, torch.zeros(2).half(), 0.0, None), "rstd is"),
    (lambda: ops().rms_norm_backward(X[:1], None, X, None, torch.zeros(2), 0.0, None), "dy has shape"),
    (lambda: ops().rms_norm_backward(X, X[:1], X, None, torch.zeros(2), 0.0, None), "dh has shape"),
    (lambda: ops().layer_norm_backward(X, None, X, None, torch.zeros(2, 1), torch.zeros(2), None), "mean has shape"),
    (lambda: ops().layer_norm_backward(X, None, X, None, torch.zeros(2), torch.zeros(2), torch.int8), "parameter_dtype"),
]


@pytest.mark.parametrize("call,message", BAD, ids=[message + str(i) for i, (_, message) in enumerate(BAD)])
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
