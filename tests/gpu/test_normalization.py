# SPDX-License-Identifier: Apache-2.0
"""The norms on a GPU, held to the bounds of tests/unit/ops/test_normalization.py: rows kept by a warp, by a block, by nobody."""
import pytest
import torch
import torch.nn.functional as F

from deepspeed.ops import normalization
from tests.unit.ops import test_normalization as cpu

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

# One vector a lane, two, four; a block with one, two, four, eight and sixteen vectors a thread; rows too long for registers; odd rows.
COLUMNS = [1, 8, 129, 256, 512, 1000, 1024, 2048, 4096, 8192, 16384, 20000, 20001]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make(*shape, seed, dtype=torch.float32):
    return cpu.random(*shape, seed=seed, dtype=dtype).cuda()


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_as_accurate_as_torch(kind, residual, dtype, columns):
    vectors = [1 + make(columns, seed=7, dtype=dtype), make(columns, seed=8, dtype=dtype) if kind == "layer" else None]
    x, r, dy, dh = (make(3, 7, columns, seed=s, dtype=dtype) for s in (1, 2, 3, 4))
    cpu.compare(kind, [x, r if residual else None, *vectors], [dy, dh] if residual else [dy])


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_many_rows_repeat_bit_for_bit(kind):
    tensors = [make(30000, 264, seed=1), None, make(264, seed=2), make(264, seed=3) if kind == "layer" else None]
    grads = [make(30000, 264, seed=4)]
    cpu.compare(kind, tensors, grads)
    for a, b in zip(cpu.results(cpu.fused, kind, tensors, grads), cpu.results(cpu.fused, kind, tensors, grads)):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_parameters_misaligned_and_non_contiguous(dtype):
    x = make(12 * 96 + 1, seed=1, dtype=dtype)[1:].view(12, 96)
    weight = 1 + make(2 * 96, seed=2)[::2]
    for rows in (x, x.t().contiguous().t()):
        want = F.rms_norm(rows.double(), (96,), weight.double(), 1e-6)
        error = (normalization.rms_norm(rows, weight).double() - want).abs().max()
        assert error <= torch.finfo(dtype).eps * want.abs().max()


def test_rows_far_from_zero():
    x = 1e4 + make(16, 1000, seed=1)
    exact = F.layer_norm(x.double(), (1000,))
    assert (normalization.layer_norm(x, 1000).double() - exact).abs().max() < 1e-5


@pytest.mark.parametrize("name", cpu.operators())
def test_opcheck(name):
    operator, arguments = cpu.operators()[name]
    moved = [a.detach().cuda().requires_grad_(a.requires_grad) if torch.is_tensor(a) else a for a in arguments]
    torch.library.opcheck(operator, tuple(moved))


@pytest.mark.parametrize("shape", [(0, 8), (3, 0)])
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_empty(kind, shape):
    x = torch.zeros(shape, requires_grad=True, device="cuda")
    weight = torch.ones(shape[-1:], requires_grad=True, device="cuda")
    y, h = cpu.fused(kind, x, x, weight, None)
    (y.sum() + h.sum()).backward()
    assert x.grad.shape == shape and torch.equal(weight.grad, torch.zeros_like(weight))


def test_devices_are_not_mixed():
    with pytest.raises(ValueError, match="weight lies on"):
        normalization.rms_norm(make(2, 8, seed=1), torch.ones(8))
