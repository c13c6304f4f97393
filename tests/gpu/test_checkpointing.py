# SPDX-License-Identifier: Apache-2.0
"""Saved inputs on the host: the bits of plain training, the device's memory without them, and copies that overlap."""
import pytest
import torch
import torch.utils.checkpoint

from deepspeed import checkpointing
from deepspeed.checkpointing import configuration
from deepspeed.checkpointing.offload_activations import get_checkpoint_hidden_states_offloading_ctx_manager

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(autouse=True)
def as_at_start():
    yield
    configuration.state().accept(configuration.Options(), configured=False)


def model(layers=8, width=1024):
    torch.manual_seed(1)
    return torch.nn.ModuleList(torch.nn.Sequential(torch.nn.Linear(width, 4 * width), torch.nn.Dropout(0.1), torch.nn.GELU(),
                                                   torch.nn.Linear(4 * width, width)) for _ in range(layers)).cuda()


def train(layers, way, change=False):
    layers.zero_grad()
    torch.manual_seed(2)
    x = torch.randn(4096, 1024, device="cuda", requires_grad=True)
    y = x * 1
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for layer in layers:
        given, y = y, way(layer, y)
        if change:
            with torch.no_grad():
                given.zero_()  # right behind the copy
        del given
    held = torch.cuda.memory_allocated() - before
    y.square().sum().backward()
    return [x.grad, *(p.grad.clone() for p in layers.parameters()), torch.rand(3, device="cuda")], held


@pytest.mark.parametrize("way", [checkpointing.checkpoint, checkpointing.non_reentrant_checkpoint])
def test_bits_and_memory(way):
    layers = model()
    want, _ = train(layers, lambda layer, x: layer(x))
    got, whole = train(layers, way)
    assert all(torch.equal(a, b) for a, b in zip(got, want))
    checkpointing.configure(None, checkpoint_in_cpu=True)
    for change in (False, True, False):
        got, held = train(layers, way, change)
        assert all(torch.equal(a, b) for a, b in zip(got, want))
        assert held <= whole - 6 * 4096 * 1024 * 4, (held, whole)  # of the inputs of eight layers


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("options", [{}, {"keep_last_count": 0, "max_fwd_stash_count": 0}, {"use_streams": False}, {"use_pin_memory": False}])
def test_inputs_of_torch_checkpoints(reentrant, options):
    layers = model()

    def way(layer, x):
        return torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=reentrant)

    want, whole = train(layers, way)
    for _ in range(3):
        with get_checkpoint_hidden_states_offloading_ctx_manager(**options):
            got, held = train(layers, way)
        assert all(torch.equal(a, b) for a, b in zip(got, want)) and held < whole - 3 * 4096 * 1024 * 4


def test_copies_run_beside_the_computation():
    layers = model()
    checkpointing.configure(None, checkpoint_in_cpu=True)
    train(layers, checkpointing.checkpoint)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        train(layers, checkpointing.checkpoint)
        torch.cuda.synchronize()
    events = [e for e in profile.events() if e.device_type == torch.profiler.DeviceType.CUDA]
    copies = [e for e in events if "DtoH" in e.name and e.self_device_time_total > 100]
    kernels = [e for e in events if "gemm" in e.name.lower() or "cutlass" in e.name.lower() or "nvjet" in e.name.lower()]
    assert len(copies) >= 8
    beside = [c for c in copies if any(k.time_range.start < c.time_range.end and c.time_range.start < k.time_range.end for k in kernels)]
    assert len(beside) >= len(copies) // 2
