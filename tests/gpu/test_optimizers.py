# SPDX-License-Identifier: Apache-2.0
"""The fused optimizers and list operations on a GPU: the bits of the CPU, one launch for many tensors, CUDA graphs."""
import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from deepspeed._native import lib
from deepspeed.ops.adagrad import DeepSpeedCPUAdagrad
from deepspeed.ops.adam import FusedAdam
from deepspeed.ops.lamb import FusedLamb
from deepspeed.ops.lion import FusedLion
from deepspeed.ops.multi_tensor import clip_grad_norm_, squared_norm
from deepspeed.ops.sgd import FusedSGD

if not lib().OPS_HAVE_CUDA:
    pytest.skip("this build has no CUDA code", allow_module_level=True)

SHAPES = [(1,), (3,), (255,), (256,), (257,), (33, 31), (4099,), (), (0, 3), (300_001,)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KINDS = {
    "adamw": lambda p, **o: FusedAdam(p, lr=1e-2, weight_decay=0.1, **o),
    "adam": lambda p, **o: FusedAdam(p, lr=1e-2, weight_decay=0.1, adam_w_mode=False, **o),
    "lion": lambda p, **o: FusedLion(p, lr=1e-3, weight_decay=0.1, **o),
    "adagrad": lambda p, **o: DeepSpeedCPUAdagrad(p, lr=1e-2, weight_decay=0.1, **o),
    "sgd": lambda p, **o: FusedSGD(p, lr=1e-2, momentum=0.9, nesterov=True, **o),
    "plain sgd": lambda p, **o: FusedSGD(p, lr=1e-2, weight_decay=0.1, **o),
}
OPTIONS = [{}, dict(master="split"), dict(rounding="stochastic", seed=5), dict(state_dtype=torch.bfloat16), dict(state_dtype="8bit"),
           dict(master="split", state_dtype="8bit")]


def tensors(dtype, seed, device):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype).to(device) for shape in SHAPES]


def misaligned(t):
    """The same values, one element behind an aligned address."""
    room = torch.empty(t.numel() + 1, dtype=t.dtype, device=t.device)
    view = room[1:].view(t.shape)
    view.copy_(t)
    return view


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_bits_of_the_cpu(kind, dtype, options, shift):
    if "master" in options and dtype == torch.float16:
        options = {k: v for k, v in options.items() if k != "master"}
    runs = {}
    for device in ("cpu", "cuda"):
        values = tensors(dtype, 0, device)
        if shift and device == "cuda":
            values = [misaligned(t) for t in values]
        params = [torch.nn.Parameter(t) for t in values]
        optimizer = KINDS[kind](params, **options)
        for step in range(5):
            for p, g in zip(params, tensors(dtype, 100 + step, device)):
                p.grad = g
            optimizer.step()
        runs[device] = [[p.detach(), *(v for v in optimizer.state[p].values() if torch.is_tensor(v))] for p in params]
    for ours, theirs in zip(runs["cuda"], runs["cpu"]):
        for a, b in zip(ours, theirs):
            assert torch.equal(a.cpu(), b)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_lamb_is_close_to_the_cpu(options):
    """The norms are summed in another order, so the trust ratios may differ by some roundings of float64, the update by one of float32."""
    runs = {}
    for device in ("cpu", "cuda"):
        params = [torch.nn.Parameter(t) for t in tensors(torch.float32 if not options.get("master") else torch.bfloat16, 0, device)]
        optimizer = FusedLamb(params, lr=1e-2, weight_decay=0.1, **options)
        for step in range(3):
            for p, g in zip(params, tensors(p.dtype, 100 + step, device)):
                p.grad = g
            optimizer.step()
        runs[device] = [p.detach().cpu().double() for p in params]
    for a, b, p in zip(runs["cuda"], runs["cpu"], params):
        torch.testing.assert_close(a, b, rtol=4 * torch.finfo(p.dtype).eps, atol=4 * torch.finfo(p.dtype).eps)


def test_twenty_thousand_tensors_take_a_few_launches():
    params = [torch.nn.Parameter(torch.full((64,), float(i % 7), device="cuda")) for i in range(20_000)]
    for i, p in enumerate(params):
        p.grad = torch.full_like(p, 1.0 + i % 3)
    optimizer = FusedAdam(params, lr=1e-2)
    optimizer.step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step()
        torch.cuda.synchronize()
    kernels = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA and "mem" not in e.name.lower()]
    assert len(kernels) <= 3, [e.name for e in kernels]
    for i in (0, 1, 19_999):
        one = torch.nn.Parameter(torch.full((64,), float(i % 7), device="cuda"))
        one.grad = torch.full_like(one, 1.0 + i % 3)
        alone = FusedAdam([one], lr=1e-2)
        alone.step(), alone.step()
        assert torch.equal(one, params[i])


@pytest.mark.parametrize("count", [3, 2000])
def test_steps_are_captured_in_graphs(count):
    params = [torch.nn.Parameter(torch.ones(100, device="cuda")) for _ in range(count)]
    eager = [torch.nn.Parameter(torch.ones(100, device="cuda")) for _ in range(count)]
    for p, q in zip(params, eager):
        p.grad = torch.randn(100, device="cuda")
        q.grad = p.grad.clone()
    optimizer, other = FusedSGD(params, lr=0.1), FusedSGD(eager, lr=0.1)
    optimizer.step(), other.step()  # outside the graph, so that everything is allocated
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    churn = [torch.empty(2**20, dtype=torch.uint8, pin_memory=True).fill_(255) for _ in range(8)]  # host memory that others take afterwards
    for _ in range(3):
        graph.replay()
        other.step()
    torch.cuda.synchronize()
    assert all(torch.equal(p, q) for p, q in zip(params, eager)) and churn


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_and_clipping(dtype):
    ts = tensors(dtype, 3, "cuda")
    total, bad = squared_norm(ts)
    exact = sum(t.double().square().sum() for t in ts)
    assert abs(total - exact) <= exact * 2.0**-37 and bad == 0
    assert torch.equal(squared_norm(ts)[0], total)
    for limit in (0.5, 1e6):
        params, on_cpu = ([torch.nn.Parameter(torch.zeros_like(t)) for t in tensors(dtype, 3, device)] for device in ("cuda", "cpu"))
        for ps, device in ((params, "cuda"), (on_cpu, "cpu")):
            for p, g in zip(ps, tensors(dtype, 3, device)):
                p.grad = g
            clip_grad_norm_(ps, limit)
        for p, q in zip(params, on_cpu):  # the factors agree to some roundings of float64, so they are within one of float32
            torch.testing.assert_close(p.grad.cpu().float(), q.grad.float(), rtol=2 * torch.finfo(dtype).eps, atol=0)
    ts[6][17] = float("nan")
    assert squared_norm(ts)[1] == 1
