# SPDX-License-Identifier: Apache-2.0
"""Both forms of cross-entropy against float64, beside plain torch at the same dtype; tests/gpu/test_cross_entropy.py runs these on a GPU."""
import pytest
import torch
from torch.nn import functional as F

from deepspeed.ops.cross_entropy import FusedLinearCrossEntropy, cross_entropy, linear_cross_entropy
from tests.bench.op_race import assert_no_worse

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def device():
    return "cpu"


def gradients(f, leaves, grad=None):
    """[loss, gradient of every leaf]."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in leaves]
    loss = f(*leaves)
    loss.backward(None if grad is None else grad.to(loss.dtype))
    return [loss.detach()] + [None if t is None else t.grad for t in leaves]


def make_labels(tokens, vocabulary, device, ignored=-100):
    labels = torch.randint(vocabulary, (tokens,), device=device)
    labels[::4] = ignored
    return labels


def doubled(tensors):
    return [None if t is None else t.double() for t in tensors]


def assert_all_no_worse(ours, peer, exact, names):
    for name, a, b, c in zip(names, ours, peer, exact, strict=True):
        if a is not None:
            assert_no_worse(a, b, c, name)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [1, 2, 33, 1000, 5000])
def test_given_logits(device, dtype, vocabulary, reduction):
    torch.manual_seed(vocabulary)
    logits = (torch.randn(23, vocabulary, device=device) * 4).to(dtype)
    labels = make_labels(23, vocabulary, device)
    grad = torch.rand(23, device=device) if reduction == "none" else torch.tensor(1.5, device=device)
    for smoothing in (0.0, 0.1):
        for inplace in (False, True):
            # Nudged, so that what may be overwritten is not a leaf.
            ours = gradients(lambda x: cross_entropy(x + 0 if inplace else x, labels, label_smoothing=smoothing, reduction=reduction,
                                                     inplace_backward=inplace), [logits], grad)
            peer, exact = (gradients(lambda x: F.cross_entropy(x, labels, label_smoothing=smoothing, reduction=reduction), [x], grad)
                           for x in (logits, logits.double()))
            assert ours[0].dtype == dtype and ours[0].shape == peer[0].shape
            assert_all_no_worse(ours, peer, exact, ["loss", "dlogits"])


def test_logits_of_more_dimensions(device):
    logits, labels = torch.randn(2, 5, 30, device=device), torch.randint(30, (2, 5), device=device)
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").reshape(2, 5)
    torch.testing.assert_close(cross_entropy(logits, labels, reduction="none"), expected, rtol=1e-6, atol=1e-6)
    turned = logits.transpose(0, 1)
    assert torch.equal(cross_entropy(turned, labels.t(), reduction="none"), cross_entropy(logits, labels, reduction="none").t())


def test_z_loss(device):
    logits, labels = torch.randn(7, 30, device=device), make_labels(7, 30, device)

    def plain(x):
        return F.cross_entropy(x, labels, reduction="sum") + 0.01 * (x.logsumexp(-1)**2 * (labels != -100)).sum()

    ours = gradients(lambda x: cross_entropy(x, labels, reduction="sum", z_loss=0.01), [logits])
    assert_all_no_worse(ours, gradients(plain, [logits]), gradients(plain, [logits.double()]), ["loss", "dlogits"])


def test_the_gradient_lies_over_the_logits(device):
    logits = torch.randn(7, 30, device=device, requires_grad=True)
    inner = logits * 1
    seen = []
    inner.register_hook(lambda g: seen.append(g.data_ptr()))
    cross_entropy(inner, torch.arange(7, device=device), inplace_backward=True).backward()
    assert seen == [inner.data_ptr()]
    with pytest.raises(ValueError, match="logits must be contiguous"):
        cross_entropy(torch.randn(30, 7, device=device).t(), torch.arange(7, device=device), inplace_backward=True)


def torch_loss(hidden, weight, labels, bias, smoothing, reduction, ignored=-100):
    logits = hidden @ weight.t()
    logits = logits if bias is None else logits + bias
    return F.cross_entropy(logits, labels, ignore_index=ignored, label_smoothing=smoothing, reduction=reduction)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunk", [1, 7, 8, 100, None])
def test_fused_with_the_linear_layer(device, dtype, chunk, reduction):
    torch.manual_seed(0)
    tokens, features, vocabulary = 37, 24, 301
    labels = make_labels(tokens, vocabulary, device)
    grad = torch.rand(tokens, device=device) if reduction == "none" else torch.tensor(1.0 if chunk == 7 else 0.5, device=device)
    for with_bias, smoothing in ((False, 0.0), (True, 0.1)):
        leaves = [torch.randn(tokens, features, device=device).to(dtype), (torch.randn(vocabulary, features, device=device) * 0.3).to(dtype),
                  torch.randn(vocabulary, device=device).to(dtype) if with_bias else None]
        ours = gradients(lambda h, w, b: linear_cross_entropy(h, w, labels, b, label_smoothing=smoothing, reduction=reduction, chunk_tokens=chunk),
                         leaves, grad)
        peer, exact = (gradients(lambda h, w, b: torch_loss(h, w, labels, b, smoothing, reduction), x, grad) for x in (leaves, doubled(leaves)))
        assert ours[0].dtype == torch.float32 and all(g is None or g.dtype == dtype for g in ours[1:])
        assert_all_no_worse(ours, peer, exact, ["loss", "dhidden", "dweight", "dbias"])


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (0, 2), (1, 2)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_frozen_inputs_get_no_gradient(device, reduction, frozen):
    labels = make_labels(9, 20, device)
    tensors = [torch.randn(9, 6, device=device), torch.randn(20, 6, device=device), torch.randn(20, device=device)]
    results = []
    for f in (lambda h, w, b: linear_cross_entropy(h, w, labels, b, reduction=reduction), lambda h, w, b: torch_loss(h, w, labels, b, 0.0, reduction)):
        leaves = [t.clone().requires_grad_(i not in frozen) for i, t in enumerate(tensors)]
        f(*leaves).sum().backward()
        results.append([t.grad for t in leaves])
    for i, (ours, peer) in enumerate(zip(*results)):
        assert (ours is None) == (peer is None) == (i in frozen)
        if ours is not None:
            torch.testing.assert_close(ours, peer, rtol=1e-5, atol=1e-6)  # roundings of sums of 20 products of at most 10


def test_all_labels_ignored(device):
    labels = torch.full((5,), 3, device=device)
    hidden, weight = torch.randn(5, 6, device=device), torch.randn(20, 6, device=device)
    for reduction in ("mean", "sum", "none"):
        for f, leaves in ((lambda h, w: linear_cross_entropy(h, w, labels, ignore_index=3, reduction=reduction).sum(), [hidden, weight]),
                          (lambda x: cross_entropy(x, labels, ignore_index=3, reduction=reduction).sum(), [hidden @ weight.t()])):
            loss, *grads = gradients(f, leaves)
            assert loss.isnan() if reduction == "mean" else loss == 0
            assert reduction == "mean" or not any(g.any() for g in grads)
    _, *grads = gradients(lambda h, w: linear_cross_entropy(h, w, labels, ignore_index=3), [hidden, weight])
    assert not any(g.any() for g in grads)


def test_no_tokens(device):
    labels = torch.empty(0, dtype=torch.int64, device=device)
    leaves = [torch.empty(0, 6, device=device), torch.randn(20, 6, device=device), torch.randn(20, device=device)]
    loss, dh, dw, db = gradients(lambda h, w, b: linear_cross_entropy(h, w, labels, b, reduction="sum"), leaves)
    assert loss == 0 and dh.shape == (0, 6) and not dw.any() and not db.any() and dw.shape == (20, 6)
    assert linear_cross_entropy(*leaves[:2], labels).isnan()
    assert cross_entropy(torch.empty(0, 20, device=device), labels, reduction="none").shape == (0,)


def test_backward_runs_once_or_recomputes(device):
    labels = torch.randint(20, (5,), device=device)
    hidden = torch.randn(5, 6, device=device, requires_grad=True)
    weight = torch.randn(20, 6, device=device)
    loss = linear_cross_entropy(hidden, weight, labels)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward ran a second time"):
        loss.backward()
    first, hidden.grad = hidden.grad, None
    losses = linear_cross_entropy(hidden, weight, labels, reduction="none")
    losses.mean().backward(retain_graph=True)
    torch.testing.assert_close(hidden.grad, first)
    losses.mean().backward()
    torch.testing.assert_close(hidden.grad, 2 * first)


def test_no_gradients_are_made_that_nobody_wants(device):
    hidden, weight = torch.randn(5, 6, device=device, requires_grad=True), torch.randn(20, 6, device=device, requires_grad=True)
    labels = torch.randint(20, (5,), device=device)
    with torch.no_grad():
        loss = linear_cross_entropy(hidden, weight, labels)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, linear_cross_entropy(hidden, weight, labels).detach(), rtol=0, atol=0)


def test_sizes_alone():
    hidden, weight, labels = torch.empty(6, 4, device="meta"), torch.empty(10, 4, device="meta"), torch.empty(6, dtype=torch.int64, device="meta")
    assert linear_cross_entropy(hidden, weight, labels, reduction="none").shape == (6,)
    assert cross_entropy(hidden @ weight.t(), labels).shape == ()


def test_labels_out_of_range_are_named_by_position(device):
    hidden, weight = torch.randn(6, 4, device=device), torch.randn(10, 4, device=device)
    for bad in (-1, 10, -100):
        labels = torch.tensor([0, 3, 9, bad, 1, bad], device=device)
        for f in (lambda: cross_entropy(hidden @ weight.t(), labels, ignore_index=3), lambda: linear_cross_entropy(hidden, weight, labels, ignore_index=3)):
            with pytest.raises(ValueError, match=rf"labels\[3\] is {bad}, must lie in \[0, 10\)"):
                f()


def test_backward_does_not_write_outside_its_rows():
    """The operator itself, called with labels that the forward pass has not seen."""
    from deepspeed.ops._library import ops
    logits, grad, stats = torch.randn(3, 10), torch.ones(3), torch.ones(3, 2)
    for bad in (-1, 10, 2**40):
        labels = torch.tensor([0, bad, 1])
        for f in (ops().cross_entropy_backward, lambda g, x, *rest: ops().cross_entropy_backward_(x, g, *rest)):
            with pytest.raises(ValueError, match=rf"labels\[1\] is {bad}, must lie in"):
                f(grad, logits.clone(), labels, stats, -100, 0.0, 0.0)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("loss_scale", [1.0, 65536.0])
def test_half_precision_under_a_loss_scale(device, reduction, loss_scale):
    """Gradients that are scaled in time neither vanish nor overflow: as near to the exact ones as torch's."""
    torch.manual_seed(0)
    hidden, weight = (torch.randn(n, 16, device=device).half().mul(0.5).requires_grad_() for n in (2048, 1024))
    labels = torch.randint(1024, (2048,), device=device)
    factor = loss_scale if reduction == "mean" else loss_scale / 2048
    grads = {}
    for name, dtype in (("exact", torch.float64), ("torch", torch.float32)):
        loss = torch.nn.functional.cross_entropy((hidden.to(dtype) @ weight.to(dtype).t()), labels, reduction=reduction)
        grads[name] = torch.autograd.grad(loss * factor, [hidden, weight])
    ours = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels, reduction=reduction, chunk_tokens=500) * factor, [hidden, weight])
    for g, exact in zip(ours, grads["exact"]):
        assert torch.isfinite(g).all()
        # logits and their gradients are rounded to fp16 on the way, which torch's fp32 logits here are not
        assert (g.double() - exact.double()).abs().max() <= 8 * torch.finfo(torch.float16).eps * exact.double().abs().max()


def test_overwritten_logits_are_noticed():
    z = torch.tanh(torch.randn(4, 6, requires_grad=True))   # tanh has saved its result
    loss = cross_entropy(z, torch.tensor([0, 1, 2, 3]), inplace_backward=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    z = torch.randn(4, 6, requires_grad=True) * 1.0
    loss = cross_entropy(z, torch.tensor([0, 1, 2, 3]), inplace_backward=True)
    torch.autograd.grad(loss, z, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, z)


def test_bad_arguments_are_named(device):
    h, w, t = torch.randn(6, 4, device=device), torch.randn(10, 4, device=device), torch.zeros(6, dtype=torch.int64, device=device)
    for call, message in [(lambda: linear_cross_entropy(h.double(), w, t), "hidden: dtype"), (lambda: linear_cross_entropy(h, w.bfloat16(), t), "weight is"),
                          (lambda: linear_cross_entropy(h, w[:, :3], t), "weight has shape"), (lambda: linear_cross_entropy(h, w, t.int()), "labels: dtype"),
                          (lambda: linear_cross_entropy(h, w, t[:5]), "labels have shape"), (lambda: linear_cross_entropy(h, w, t, w[0]), "bias has shape"),
                          (lambda: linear_cross_entropy(h, w, t, chunk_tokens=0), "chunk_tokens"), (lambda: linear_cross_entropy(h, w, t, reduction="x"), "reduction"),
                          (lambda: linear_cross_entropy(h, w, t, label_smoothing=1.5), "label_smoothing"), (lambda: cross_entropy(h, t, z_loss=-1.0), "z_loss"),
                          (lambda: cross_entropy(h.double(), t), "logits: dtype"), (lambda: cross_entropy(h, t[:5]), "labels have shape"),
                          (lambda: cross_entropy(h, t.to("meta")), "labels lies on"), (lambda: linear_cross_entropy(h, w, t.to("meta")), "labels lies on")]:
        with pytest.raises(ValueError, match=message):
            call()


def test_opcheck(device):
    ops = torch.ops.deepspeed
    h, w = torch.randn(6, 4, device=device, requires_grad=True), torch.randn(10, 4, device=device, requires_grad=True)
    b, t = torch.randn(10, device=device, requires_grad=True), torch.randint(10, (6,), device=device)
    logits = torch.randn(6, 10, device=device)
    losses, stats = ops.cross_entropy(logits, t, -100, 0.1, 0.0)
    torch.library.opcheck(ops.cross_entropy.default, (logits.clone().requires_grad_(), t, -100, 0.1, 0.0))
    torch.library.opcheck(ops.cross_entropy_backward.default, (torch.rand_like(losses), logits, t, stats, -100, 0.1, 0.0))
    torch.library.opcheck(ops.cross_entropy_backward_.default, (logits.clone(), torch.rand_like(losses), t, stats, -100, 0.1, 0.0))
    for reduction in (0, 2):
        torch.library.opcheck(ops.linear_cross_entropy.default, (h, w, b, t, reduction, -100, 0.0, 0.0, 4))
    torch.library.opcheck(ops.linear_cross_entropy_chunks.default,
                          (h.detach(), w.detach(), None, t, torch.rand(6, device=device), 0, -100, 0.0, 0.0, 4, [True, True, False]))
    torch.library.opcheck(ops.scale_unless_one_.default, (logits, torch.tensor(2.0, device=device)))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_in_one_graph(device, reduction):
    module = FusedLinearCrossEntropy(8, 50, bias=True, reduction=reduction, chunk_tokens=4).to(device)
    compiled = torch.compile(lambda x, t: module(x * 2, t).sum() * 3, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (5, 11):
        x, t = torch.randn(tokens, 8, device=device, requires_grad=True), make_labels(tokens, 50, device)
        y = x.detach().clone().requires_grad_()
        compiled(x, t).backward()
        compiled_grads, module.weight.grad = module.weight.grad, None
        (module(y * 2, t).sum() * 3).backward()
        assert torch.equal(x.grad, y.grad) and torch.equal(compiled_grads, module.weight.grad)
        module.zero_grad()


def test_module(device):
    module = FusedLinearCrossEntropy(8, 50, bias=True, ignore_index=0, label_smoothing=0.1).to(device)
    x, t = torch.randn(2, 9, 8, device=device), torch.randint(50, (2, 9), device=device)
    expected = torch_loss(x.flatten(0, 1), module.weight, t.flatten(), module.bias, 0.1, "mean", ignored=0)
    torch.testing.assert_close(module(x, t), expected, rtol=1e-5, atol=1e-6)
    assert sorted(module.state_dict()) == ["bias", "weight"]


def test_threads_change_no_bit_of_the_rows():
    logits, labels = torch.randn(300, 2000), torch.randint(2000, (300,))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(gradients(lambda x: cross_entropy(x, labels, label_smoothing=0.1, reduction="none"), [logits], torch.rand(300, generator=torch.Generator().manual_seed(0))))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_a_leaf_keeps_its_memory():
    leaf = torch.randn(4, 7, requires_grad=True)
    with pytest.raises(ValueError, match="logits is a leaf"):
        cross_entropy(leaf, torch.arange(4), inplace_backward=True)
    cross_entropy(leaf.detach(), torch.arange(4), inplace_backward=True)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_forward_mode_derivatives_are_refused(reduction):
    hidden, weight, labels = torch.randn(4, 8), torch.randn(11, 8), torch.arange(4)

    def loss(hidden):
        return linear_cross_entropy(hidden, weight, labels, reduction=reduction)
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.jvp(loss, (hidden,), (hidden,))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match="jvp is not implemented"):
        loss(torch.autograd.forward_ad.make_dual(hidden, hidden))
