# SPDX-License-Identifier: Apache-2.0
"""scaled_masked_softmax against float64, beside plain torch at the same dtype; tests/gpu/test_softmax.py runs these on a GPU."""
import pytest
import torch

from deepspeed.ops.softmax import FusedSoftmax, scaled_masked_softmax
from tests.bench.op_race import assert_no_worse

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INF = float("inf")


@pytest.fixture
def device():
    return "cpu"


def composed(x, mask, scale, causal):
    """The same in plain torch, at x's dtype. Rows that are hidden entirely are NaN here."""
    z = x * scale
    if mask is not None:
        z = z.masked_fill(mask, -INF) if mask.dtype == torch.bool else z + mask.to(z.dtype)
    if causal:
        queries, keys = x.shape[-2:]
        z = z.masked_fill(torch.ones(queries, keys, dtype=torch.bool, device=x.device).triu(1 + keys - queries), -INF)
    return torch.softmax(z, -1)


def forward_backward(f, x, mask, grad):
    x = x.detach().requires_grad_()
    y = f(x, mask)
    y.backward(grad.to(y.dtype))
    return y.detach(), x.grad


def assert_accurate(x, mask=None, scale=1.0, causal=False):
    grad = torch.randn(x.shape, device=x.device).to(x.dtype)
    wide = mask.double() if mask is not None and mask.dtype != torch.bool else mask
    exact = forward_backward(lambda a, m: composed(a, m, scale, causal).nan_to_num(0.0), x.double(), wide, grad)
    peer = forward_backward(lambda a, m: composed(a, m, scale, causal).nan_to_num(0.0), x, mask, grad)
    ours = forward_backward(lambda a, m: scaled_masked_softmax(a, m, scale, causal), x, mask, grad)
    for name, a, b, c in zip(("y", "dx"), ours, peer, exact):
        assert a.shape == x.shape and a.dtype == x.dtype and a.is_contiguous()
        assert_no_worse(a, b.nan_to_num(0.0), c.nan_to_num(0.0), f"{name} {tuple(x.shape)} {x.dtype}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 2, 7, 63, 64, 65, 130, 256, 1000, 1024, 2047, 4096, 8192, 8200, 16384, 16387, 40000])
def test_rows_of_any_length(device, dtype, columns):
    torch.manual_seed(columns)
    rows = 5 + 4096 // columns  # of few short rows the largest error is a matter of luck: scale * x is rounded, here as in torch
    assert_accurate((torch.randn(rows, columns, device=device) * 3).to(dtype), scale=0.7)


MASK_SHAPES = [(1, 1, 1, 37), (2, 1, 1, 37), (2, 1, 9, 37), (1, 1, 9, 37), (1, 3, 9, 37), (2, 3, 9, 37), (9, 37), (37,), (3, 1, 37), (2, 3, 9, 1), (1,), ()]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", MASK_SHAPES)
def test_broadcast_masks(device, shape, causal):
    torch.manual_seed(1)
    for dtype in DTYPES:
        x = torch.randn(2, 3, 9, 37, device=device).to(dtype)
        added = torch.randn(shape, device=device)
        hidden = torch.rand(shape, device=device) < 0.4
        for mask in (added.to(dtype), added.masked_fill(hidden, -INF), hidden):
            assert_accurate(x, mask, 0.3, causal)


def test_strided_masks(device):
    x = torch.randn(2, 3, 2, 9, 37, device=device)
    for mask in (torch.randn(37, 9, device=device).t(), torch.randn(2, 1, 2, 9, 74, device=device)[..., ::2], torch.randn(2, 5, 2, 9, 37, device=device)[:, 1:4],
                 torch.randn(3, 2, 1, 9, 37, device=device).transpose(0, 1)):
        assert torch.equal(scaled_masked_softmax(x, mask), scaled_masked_softmax(x, mask.expand(x.shape).contiguous()))


@pytest.mark.parametrize("shape, mask, copied", [
    ((2, 3, 9, 37), torch.zeros(2, 1, 1, 37), None), ((2, 3, 9, 37), torch.zeros(9, 37), None), ((2, 3, 9, 37), torch.zeros(2, 3, 9, 1), [2, 3, 9, 37]),
    ((2, 3, 9, 37), torch.zeros(2, 1, 1, 74)[..., ::2], [2, 1, 1, 37]), ((2,) * 6 + (5,), torch.zeros([2, 1] * 3 + [5]), None),
    ((2,) * 7 + (5,), torch.zeros([2, 1] * 3 + [2, 5]), [2] * 7 + [5])])
def test_masks_are_copied_where_the_docstring_says(shape, mask, copied):
    x = torch.zeros(shape)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        scaled_masked_softmax(x, mask)
    copies = [event.input_shapes[0] for event in profile.events() if event.name == "aten::copy_"]
    assert copies == ([] if copied is None else [copied])


def test_masks_that_do_not_collapse(device):
    shape = (2,) * 15 + (5,)  # every other dimension repeats: more pieces than the kernels' view of a mask has
    x = torch.randn(shape, device=device)
    mask = torch.randn([2 if d % 2 else 1 for d in range(15)] + [5], device=device)
    assert torch.equal(scaled_masked_softmax(x, mask), scaled_masked_softmax(x, mask.expand(shape).contiguous()))


@pytest.mark.parametrize("queries, keys", [(1, 1), (1, 70), (33, 33), (5, 70), (70, 5), (300, 300)])
def test_causal(device, queries, keys):
    for dtype in DTYPES:
        assert_accurate(torch.randn(2, queries, keys, device=device).to(dtype), scale=0.5, causal=True)


def test_the_hidden_part_of_a_causal_row_is_not_read(device):
    x = torch.randn(40, 50, device=device)
    hidden = torch.ones(40, 50, dtype=torch.bool, device=device).triu(11)
    y = scaled_masked_softmax(x.masked_fill(hidden, float("nan")), causal=True)
    assert torch.equal(y, scaled_masked_softmax(x, causal=True))
    assert not y[hidden].any()
    grad = torch.randn(40, 50, device=device)
    backward = torch.ops.deepspeed.scaled_masked_softmax_backward
    assert torch.equal(backward(grad.masked_fill(hidden, float("nan")), y, 1.0, True), backward(grad, y, 1.0, True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_hidden_entirely_are_zero(device, dtype):
    x = torch.randn(2, 4, 70, device=device).to(dtype).requires_grad_()
    hidden = torch.zeros(4, 1, dtype=torch.bool, device=device)
    hidden[2] = True
    for mask in (hidden, torch.where(hidden, -INF, 0.0)):
        y = scaled_masked_softmax(x, mask)
        x.grad = None
        y.backward(torch.randn_like(y))
        for values in (y.detach(), x.grad):
            assert not values[:, 2].any()
            assert values[:, (0, 1, 3)].any(-1).all()
    assert not scaled_masked_softmax(torch.full((3, 70), -INF, dtype=dtype, device=device)).any()


def test_nan_and_infinity_spoil_their_row_alone(device):
    for odd in (float("nan"), INF):
        x = torch.randn(3, 70, device=device)
        x[1, 33] = odd
        y = scaled_masked_softmax(x)
        assert y[1].isnan().all() and not y[::2].isnan().any()
    x[1] = -INF
    x[1, 3] = float("nan")
    assert scaled_masked_softmax(x)[1].isnan().all()


def test_gradient_of_the_mask(device):
    torch.manual_seed(2)
    x = torch.randn(2, 3, 9, 37, device=device)
    grad = torch.randn_like(x)
    for shape in ((3, 1, 37), (2, 1, 9, 37), (1,)):
        ours, exact = torch.randn(shape, device=device, requires_grad=True), None
        exact = ours.detach().double().requires_grad_()
        peer = ours.detach().clone().requires_grad_()
        scaled_masked_softmax(x, ours, 0.4, True).backward(grad)
        composed(x, peer, 0.4, True).backward(grad)
        composed(x.double(), exact, 0.4, True).backward(grad.double())
        assert_no_worse(ours.grad, peer.grad, exact.grad, f"dmask {shape}")


def test_second_derivatives(device):
    x = torch.randn(4, 9, device=device, requires_grad=True)
    exact = x.detach().double().requires_grad_()
    results = []
    for leaf, f in ((x, lambda a: scaled_masked_softmax(a, scale=0.7, causal=True)), (exact, lambda a: composed(a, None, 0.7, True))):
        first, = torch.autograd.grad((f(leaf)**2).sum(), leaf, create_graph=True)
        results.append(torch.autograd.grad((first**2).sum(), leaf)[0])
    torch.testing.assert_close(results[0].double(), results[1], rtol=1e-4, atol=1e-6)  # sums of 9 products of float32 roundings, twice


def test_strided_and_empty_input(device):
    x = torch.randn(6, 70, 5, device=device)
    assert torch.equal(scaled_masked_softmax(x.transpose(1, 2)), scaled_masked_softmax(x.transpose(1, 2).contiguous()))
    for shape in ((0, 7), (7, 0), (2, 0, 3), (0,)):
        empty = torch.empty(shape, device=device, requires_grad=True)
        y = scaled_masked_softmax(empty, torch.zeros(shape[-1:], device=device))
        y.sum().backward()
        assert y.shape == shape and empty.grad.shape == shape


def test_bad_arguments_are_named(device):
    x = torch.randn(4, 8, device=device)
    for arguments, message in [((x.double(),), "x: dtype"), ((x.int(),), "x: dtype"), ((x[0, 0],), "x has shape"), ((x[0], None, 1.0, True), "x has shape"),
                               ((x, torch.zeros(5, device=device)), "mask of shape"), ((x, torch.zeros(1, 4, 8, device=device)), "mask of shape"),
                               ((x, torch.zeros(8, dtype=torch.int64, device=device)), "mask: dtype"), ((x, torch.zeros(8, device="meta")), "mask lies on")]:
        with pytest.raises(ValueError, match=message):
            scaled_masked_softmax(*arguments)
    with pytest.raises(ValueError, match="grad has shape"):
        torch.ops.deepspeed.scaled_masked_softmax_backward(x[:2], x, 1.0, False)


def test_opcheck(device):
    x = torch.randn(2, 3, 9, 20, device=device, requires_grad=True)
    mask = torch.randn(2, 1, 1, 20, device=device)
    for arguments in ((x, None, 0.5, False), (x, mask, 0.5, True), (x.detach().bfloat16(), mask > 0, 1.0, False), (x.transpose(1, 2), None, 1.0, False)):
        torch.library.opcheck(torch.ops.deepspeed.scaled_masked_softmax.default, arguments)
    y = torch.softmax(x.detach(), -1)
    torch.library.opcheck(torch.ops.deepspeed.scaled_masked_softmax_backward.default, (torch.randn_like(y), y, 0.5, False))
    torch.library.opcheck(torch.ops.deepspeed.scaled_masked_softmax_backward_.default, (torch.randn_like(y), y, 0.5, False))


def test_compiles_in_one_graph(device):
    module = FusedSoftmax(scale=0.5, causal=True)
    compiled = torch.compile(lambda a, m: module(a * 2, m).sin(), fullgraph=True, dynamic=True, backend="aot_eager")
    for queries, keys in ((5, 9), (6, 20)):
        a = torch.randn(2, queries, keys, device=device, requires_grad=True)
        b = a.detach().clone().requires_grad_()
        mask = torch.randn(2, 1, keys, device=device)
        ours, plain = compiled(a, mask), module(b * 2, mask).sin()
        ours.sum().backward()
        plain.sum().backward()
        assert torch.equal(ours, plain) and torch.equal(a.grad, b.grad)


def test_module_says_what_it_is():
    assert repr(FusedSoftmax(0.5, True)) == "FusedSoftmax(scale=0.5, causal=True)"


def test_threads_change_no_bit():
    x = torch.randn(3, 200, 700)
    grad = torch.randn_like(x)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(forward_backward(lambda a, m: scaled_masked_softmax(a, m, 0.5, True), x, torch.zeros(700), grad))
    finally:
        torch.set_num_threads(before)
    for y, dx in results[1:]:
        assert torch.equal(y, results[0][0]) and torch.equal(dx, results[0][1])
