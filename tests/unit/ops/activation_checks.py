# SPDX-License-Identifier: Apache-2.0
"""What the fused activations are held to, on any device: tests/unit/ops runs it on the CPU, tests/gpu on a GPU."""
import torch
from torch.nn import functional as F

from deepspeed.ops import activations
from deepspeed.ops._library import ops

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ACTS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
}
FUSED = {
    "gelu": activations.bias_gelu,
    "gelu_tanh": lambda x, bias=None: activations.bias_gelu(x, bias, approximate="tanh"),
    "silu": activations.bias_silu,
    "relu": activations.bias_relu,
}
GATED = {
    "gelu": activations.geglu,
    "gelu_tanh": lambda *args, **kwargs: activations.geglu(*args, **kwargs, approximate="tanh"),
    "silu": activations.swiglu,
    "relu": activations.reglu,
}
SHAPES = [(3, 5, 64), (2, 1), (7, 33), (1, 257), (130, 1030)]


def inputs(seed, device, dtype, *shapes, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    return [(scale * torch.randn(shape, generator=generator)).to(device, dtype).requires_grad_() for shape in shapes]


def doubles(tensors):
    return [t.detach().double().requires_grad_() for t in tensors]


def results(function, leaves, grad):
    """The output and the leaves' gradients."""
    out = function(*leaves)
    return [out, *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


def assert_no_worse(ours, peer, exact, what, factor=0.0):
    """Each of ours errs from fp64 at most twice as much as plain torch's at this dtype, or by twice the rounding of the largest value (torch is
    exact by chance where there are few) or of `factor`, the size of what a value is made of: a slope near its zero is a difference."""
    for index, (a, b, c) in enumerate(zip(ours, peer, exact, strict=True)):
        assert a.dtype == b.dtype and a.shape == b.shape
        floor = torch.finfo(a.dtype).eps * max(factor, c.abs().max().item())
        error, allowed = (a.double() - c).abs().max().item(), 2 * (b.double() - c).abs().max().item()
        assert error <= max(allowed, floor), f"{what}, result {index}: {error:.3g}, plain torch {allowed / 2:.3g}"


def compare(fused, plain, leaves, grad, what):
    ours, peer = results(fused, leaves, grad), results(plain, leaves, grad)
    exact = results(plain, doubles(leaves), grad.double())
    assert_no_worse(ours, peer, exact, what, grad.abs().max().item())


def check_bias_act(device, dtype, act, shape, with_bias):
    leaves = inputs(0, device, dtype, shape, *([shape[-1:]] if with_bias else []))
    grad = inputs(1, device, dtype, shape)[0].detach()
    compare(FUSED[act], lambda x, bias=0.0: ACTS[act](x + bias), leaves, grad, f"{act} {shape} {dtype}")


def check_gated(device, dtype, act, shape):
    leaves = inputs(0, device, dtype, shape, shape)
    grad = inputs(1, device, dtype, shape)[0].detach()
    compare(GATED[act], lambda gate, up: ACTS[act](gate) * up, leaves, grad, f"{act} {shape} {dtype}")


def check_gated_halves(device, dtype, act, shape, with_bias):
    wide = (*shape[:-1], 2 * shape[-1])
    leaves = inputs(0, device, dtype, wide, *([wide[-1:]] if with_bias else []))
    grad = inputs(1, device, dtype, shape)[0].detach()

    def plain(x, bias=0.0):
        gate, up = (x + bias).chunk(2, -1)
        return ACTS[act](gate) * up

    compare(lambda x, bias=None: GATED[act](x, bias=bias), plain, leaves, grad, f"{act} {shape} {dtype}")


def check_float_bias(device, dtype):
    """A float32 bias beside a narrower x keeps its own precision and dtype."""
    x, = inputs(0, device, dtype, (9, 40))
    bias, = inputs(1, device, torch.float32, (40,))
    grad = torch.ones_like(x)
    out, dx, dbias = results(activations.bias_gelu, [x, bias], grad)
    exact = results(lambda x, bias: F.gelu(x + bias), doubles([x, bias]), grad.double())
    assert out.dtype == dx.dtype == dtype and dbias.dtype == torch.float32
    assert_no_worse([out, dx], [t.to(dtype) for t in exact[:2]], exact[:2], "rounded once")
    # Nine slopes of at most 1.13, each 2^-15 from right before rounding (float32: much less).
    torch.testing.assert_close(dbias.double(), exact[2], rtol=0, atol=9 * 1.13 * 2**-15)


def check_layouts(device):
    """Non-contiguous inputs and gradients give the bits of contiguous ones."""
    x, bias = inputs(0, device, torch.float32, (12, 2, 10), (10,))
    grad = inputs(1, device, torch.float32, (10, 12, 2))[0].detach().permute(1, 2, 0)
    strided = x.detach().permute(1, 2, 0).contiguous().permute(2, 0, 1).requires_grad_()
    for function, leaf in ((lambda t: activations.bias_gelu(t, bias.detach()), strided), (activations.bias_silu, strided)):
        for a, b in zip(results(function, [leaf], grad), results(function, [x], grad.contiguous()), strict=True):
            assert torch.equal(a, b)
    half = grad[..., :5]
    for a, b in zip(results(activations.swiglu, [strided], half), results(activations.swiglu, [x], half.contiguous()), strict=True):
        assert torch.equal(a, b)


def check_empty(device):
    for shape in ((0, 8), (4, 0), (0,)):
        x = torch.empty(shape, device=device, requires_grad=True)
        for function in (activations.bias_gelu, lambda t: activations.swiglu(t, t), lambda t: activations.dropout_add(t, t)):
            out = function(x)
            assert out.shape == shape
            out.sum().backward()
    bias = torch.ones(8, device=device, requires_grad=True)
    activations.bias_gelu(torch.empty(0, 8, device=device), bias).sum().backward()
    assert torch.equal(bias.grad, torch.zeros(8, device=device))


def check_dropout_add(device, dtype, shape, p, with_bias):
    state = torch.tensor([1234567890123, 8], device=device)
    leaves = inputs(0, device, dtype, shape, shape, *([shape[-1:]] if with_bias else []))
    grad = inputs(1, device, dtype, shape)[0].detach()

    def fused(x, residual, bias=None):
        return ops().dropout_add(x, residual, bias, p, state)

    def plain(x, residual, bias=None):
        mask = fused(torch.ones(shape, device=device), torch.zeros(shape, device=device)) != 0
        scale = 1 / (1 - p) if p < 1 else 0.0
        return residual + (x if bias is None else x + bias) * (mask * scale).to(x.dtype)

    compare(fused, plain, leaves, grad, f"dropout {p} {shape} {dtype}")


def philox_words(seed, offset, count):
    """Words of elements 0 .. count - 1 by Python's integers, from the published algorithm (see csrc/kernels/philox.h)."""
    low = 0xFFFFFFFF
    words = []
    for group in range((count + 3) // 4):
        c = [(offset // 4) & low, (offset // 4) >> 32, group & low, group >> 32]
        k = [seed & low, seed >> 32]
        for _ in range(10):
            a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
            c = [(b >> 32) ^ c[1] ^ k[0], b & low, (a >> 32) ^ c[3] ^ k[1], a & low]
            k = [(k[0] + 0x9E3779B9) & low, (k[1] + 0xBB67AE85) & low]
        words += c
    return torch.tensor(words[:count])


def check_mask(device):
    """The mask is that of Philox for this seed and offset: one function for every device."""
    for seed, offset, shape, p in ((0, 0, (5, 7), 0.5), (2**63 - 5, 12, (3, 1001), 0.1), (77, 2**40, (4099,), 0.9)):
        x = torch.ones(shape, device=device)
        y = ops().dropout_add(x, torch.zeros_like(x), None, p, torch.tensor([seed, offset], device=device))
        dropped = (philox_words(seed, offset, x.numel()) >> 8) < round(p * 2**24)
        assert torch.equal(y.cpu().flatten() == 0, dropped)
        assert torch.equal(y[y != 0].unique(), torch.tensor([1 / (1 - p)], device=device))


def check_generator(device):
    """torch.manual_seed repeats a mask, the next call draws another, a checkpointed block drops the same elements again."""
    x, residual = inputs(0, device, torch.float32, (32, 100), (32, 100))
    torch.manual_seed(3)
    first, second = activations.dropout_add(x, residual, 0.4), activations.dropout_add(x, residual, 0.4)
    torch.manual_seed(3)
    assert torch.equal(activations.dropout_add(x, residual, 0.4), first) and not torch.equal(first, second)
    weight = torch.ones(100, device=device, requires_grad=True)

    def block(t):
        return activations.dropout_add(t * weight, residual, 0.4).square()

    gradients = []
    for checkpointed in (False, True):
        torch.manual_seed(4)
        out = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False) if checkpointed else block(x)
        gradients.append(torch.autograd.grad(out.sum(), [x, weight]))
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


def opcheck_arguments(device):
    """(operator, arguments) of every operator, with and without what is optional."""
    state = torch.tensor([5, 4], device=device)
    for dtype in (torch.float32, torch.bfloat16):
        x, grad, bias = inputs(0, device, dtype, (6, 10), (6, 10), (10,))
        half, = inputs(1, device, dtype, (6, 5))
        y, g, b = x.detach(), grad.detach(), bias.detach()
        for optional, plain in ((bias, b), (None, None)):
            yield ops().bias_act, (x, optional, "gelu")
            yield ops().bias_act_backward, (g, y, plain, "silu")
            yield ops().gated_halves, (x, optional, "gelu_tanh")
            yield ops().gated_halves_backward, (half.detach(), y, plain, "relu")
            yield ops().dropout_add, (x, grad, optional, 0.3, state)
            yield ops().dropout_add_backward, (g, plain, 0.3, state)
        yield ops().gated, (x, grad, "silu")
        yield ops().gated_backward, (g, y, g, "silu")
        yield ops().philox_state, (y,)
