# SPDX-License-Identifier: Apache-2.0
"""Norms and clipping of lists of tensors against torch and float64."""
import pytest
import torch

from deepspeed.ops.multi_tensor import clip_grad_norm_, grad_norm, squared_norm

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1,), (15,), (16,), (17,), (33, 31), (), (0, 2), (600_001,)]


def tensors(dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]


def with_gradients(grads):
    params = [torch.nn.Parameter(torch.zeros_like(g)) for g in grads]
    for p, g in zip(params, grads):
        p.grad = g.clone()
    return params


@pytest.mark.parametrize("dtype", DTYPES)
def test_squared_norm(dtype):
    ts = [*tensors(dtype), tensors(torch.float32)[4], torch.randn(6, 5).to(dtype).t()]
    total, bad = squared_norm(ts)
    exact = sum(t.double().square().sum() for t in ts)
    # Squares are exact in float64; every one of the fewer than 2^16 additions on a way to the result errs by 2^-53 of it at most.
    assert abs(total - exact) <= exact * 2.0**-37 and bad == 0 and total.dtype == torch.float64


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_is_counted(dtype):
    ts = tensors(dtype)
    ts[3][16], ts[4][0, 1], ts[7][500_000] = float("inf"), float("nan"), float("-inf")
    total, bad = squared_norm(ts)
    assert bad == 3 and not torch.isfinite(total)


def test_threads_change_no_bit():
    results, before = [], torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(squared_norm(tensors(torch.float32))[0])
    torch.set_num_threads(before)
    assert torch.equal(*results)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_clipping_as_torch(dtype, max_norm):
    ours, theirs, exact = (with_gradients(tensors(dtype)) for _ in range(3))
    norm = clip_grad_norm_(ours, max_norm)
    torch.nn.utils.clip_grad_norm_(theirs, max_norm)
    want = torch.stack([p.grad.double().square().sum() for p in exact]).sum().sqrt()
    assert abs(norm - want) <= want * 2.0**-37
    factor = min(1.0, max_norm / (want.item() + 1e-6))
    for p, q, e in zip(ours, theirs, exact):
        value = e.grad.double() * factor
        allowed = 2 * (q.grad.double() - value).abs() + torch.finfo(dtype).eps * value.abs() + torch.finfo(dtype).tiny
        assert ((p.grad.double() - value).abs() <= allowed).all()
        assert factor < 1 or torch.equal(p.grad, e.grad)


VIEWS = {
    "columns": lambda t: t[:, ::2], "rows": lambda t: t[1:3], "transposed": lambda t: t.t(), "part transposed": lambda t: t[:, 1:5].t(),
    "one column": lambda t: t[:, 3], "permuted": lambda t: t.view(2, 2, 12).permute(2, 0, 1), "one element": lambda t: t[1:2, 1:2],
    "empty": lambda t: t[:, :0:2], "flipped strides": lambda t: t.as_strided((3, 2), (2, 7)),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("view", VIEWS)
def test_strided_gradients_are_clipped_to_the_bits_of_contiguous_ones(view, dtype):
    torch.manual_seed(0)
    whole = torch.randn(4, 12).to(dtype)
    before = whole.clone()
    strided, plain, beside = VIEWS[view](whole), VIEWS[view](whole).clone(memory_format=torch.contiguous_format), torch.randn(7).to(dtype)
    params = []
    for grads in ((strided, beside.clone()), (plain, beside.clone())):
        params.append([torch.nn.Parameter(torch.zeros_like(g)) for g in grads])
        for p, g in zip(params[-1], grads):
            p.grad = g
    assert params[0][0].grad.data_ptr() == strided.data_ptr()
    exact = torch.cat([plain.double().view(-1), beside.double()]).square().sum()
    assert abs(squared_norm([strided, beside])[0] - exact) <= exact * 2.0**-40
    norm, other = (clip_grad_norm_(ps, 0.25) for ps in params)
    assert abs(norm - exact.sqrt()) <= exact * 2.0**-40 and abs(norm - other) <= exact * 2.0**-40
    for p, q in zip(*params):
        assert torch.equal(p.grad, q.grad)
    VIEWS[view](before).copy_(plain)
    assert torch.equal(whole, before)  # nothing between its elements was written
    assert abs(grad_norm(params[0]) - 0.25) < 0.25 * (1e-5 + torch.finfo(dtype).eps)


def test_gradients_that_share_elements():
    shared = torch.nn.Parameter(torch.zeros(3, 4))
    shared.grad = torch.full((3, 1), 2.0).expand(3, 4)
    assert squared_norm([shared.grad])[0] == 48 and grad_norm(shared) == 48**0.5
    for clip in (clip_grad_norm_, torch.nn.utils.clip_grad_norm_):  # no element can be scaled alone
        with pytest.raises(RuntimeError, match="refers to a single memory location"):
            clip(shared, 1.0)
    assert torch.equal(shared.grad, torch.full((3, 4), 2.0))


def test_norms_that_are_not_finite():
    params = with_gradients(tensors(torch.float32))
    params[0].grad[0] = float("nan")
    with pytest.raises(RuntimeError, match="cannot be clipped"):
        clip_grad_norm_(params, 1.0, error_if_nonfinite=True)
    assert torch.isnan(clip_grad_norm_(params, 1.0)) and torch.isnan(params[3].grad).all()


def test_single_parameters_missing_gradients_and_no_tensors():
    p, without = torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(3))
    p.grad = torch.tensor([3.0, 0.0, 4.0])
    assert grad_norm(p) == 5 and grad_norm([without, p]) == 5 and grad_norm([without]) == 0
    assert clip_grad_norm_([without], 1.0) == 0
    wide = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    wide.grad = torch.tensor([12.0, 0.0], dtype=torch.float64)
    assert grad_norm([p, wide]) == 13
    assert clip_grad_norm_([p, wide], 6.5) == 13 and abs(wide.grad[0] - 6) < 1e-6 and abs(p.grad[2] - 2) < 1e-6


def test_bad_input_is_named():
    p = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match="norm_type"):
        clip_grad_norm_(p, 1.0, norm_type=1)
    with pytest.raises(ValueError, match="max_norm must not be negative"):
        clip_grad_norm_(p, -1.0)
    with pytest.raises(ValueError, match=r"tensors\[1\]: dtype must be float32, bfloat16 or float16, not Int"):
        squared_norm([torch.ones(2), torch.ones(2, dtype=torch.int32)])
    with pytest.raises(ValueError, match=r"tensors\[0\]: sparse"):
        squared_norm([torch.ones(8).to_sparse()])
    from deepspeed._native import lib
    with pytest.raises(ValueError, match=r"tensors\[0\] overlaps itself or has gaps"):
        lib().squared_norm([torch.ones(8)[::2]])
    with pytest.raises(ValueError, match="factor must be one float64"):
        lib().scale_tensors([torch.ones(2)], torch.ones(1))
