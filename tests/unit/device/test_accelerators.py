# SPDX-License-Identifier: Apache-2.0
"""Every member of the interface on the CPU, and on a GPU where there is one."""
import inspect

import pytest
import torch

from deepspeed.device.cpu import CPU_Accelerator
from deepspeed.device.cuda import CUDA_Accelerator
from deepspeed.device.interface import DeepSpeedAccelerator

MEMBERS = """device_name device set_device current_device current_device_name device_count synchronize random set_rng_state get_rng_state
manual_seed manual_seed_all initial_seed default_generator Stream stream current_stream default_stream Event empty_cache memory_allocated
max_memory_allocated reset_max_memory_allocated memory_cached max_memory_cached reset_max_memory_cached memory_stats
reset_peak_memory_stats memory_reserved max_memory_reserved total_memory available_memory is_bf16_supported is_fp16_supported
is_fp64_supported supported_dtypes is_available is_triton_supported range_push range_pop lazy_call communication_backend_name
is_synchronized_device use_host_timers resolves_data_dependency handles_memory_backpressure create_graph capture_to_graph replay_graph
BFloat16Tensor HalfTensor FloatTensor DoubleTensor ByteTensor IntTensor LongTensor pin_memory is_pinned pin_memory_alignment pin_empty
on_accelerator op_builder_dir create_op_builder get_op_builder build_extension export_envs visible_devices_envs set_visible_devices_envs
get_compile_backend set_compile_backend _name _communication_backend_name""".split()


@pytest.fixture(params=["cpu", "cuda"])
def device(request):
    made = CPU_Accelerator() if request.param == "cpu" else CUDA_Accelerator()
    if not made.is_available():
        pytest.skip("no GPU here")
    return made


@pytest.mark.parametrize("cls", [CPU_Accelerator, CUDA_Accelerator])
def test_all_members(cls):
    assert not [name for name in MEMBERS if not hasattr(cls, name)] and not inspect.isabstract(cls)
    assert inspect.isabstract(DeepSpeedAccelerator)


def test_cuda_names_need_no_gpu():
    cuda = CUDA_Accelerator()
    assert cuda.device_name() == "cuda" and cuda.device_name(1) == cuda.device_name("1") == "cuda:1"
    assert cuda.communication_backend_name() == "nccl" and cuda.export_envs() == ["NCCL"]
    env = {}
    cuda.set_visible_devices_envs(env, [0, 2])
    assert env == {"CUDA_VISIBLE_DEVICES": "0,2"} and cuda.visible_devices_envs() == list(env)


def test_cpu_names():
    cpu = CPU_Accelerator()
    assert cpu.device_name() == cpu.device_name("3") == cpu.current_device_name() == "cpu"
    assert cpu.communication_backend_name() == "gloo" and cpu.is_synchronized_device() and cpu.use_host_timers()


def test_cpu_count_is_what_the_launcher_says(monkeypatch):
    monkeypatch.setenv("LOCAL_SIZE", "5")
    assert CPU_Accelerator().device_count() == 5
    monkeypatch.delenv("LOCAL_SIZE")
    assert CPU_Accelerator().device_count() >= 1


def test_tensors_land_on_the_device(device):
    for name, dtype in [("BFloat16Tensor", torch.bfloat16), ("HalfTensor", torch.float16), ("FloatTensor", torch.float32),
                        ("DoubleTensor", torch.float64), ("ByteTensor", torch.uint8), ("IntTensor", torch.int32),
                        ("LongTensor", torch.int64)]:
        construct = getattr(device, name)
        assert construct([1, 2]).tolist() == [1, 2] and construct(2, 3).shape == (2, 3)
        assert construct(4).dtype == dtype and device.on_accelerator(construct(4))
    assert torch.float32 in device.supported_dtypes() and device.is_fp64_supported()


def test_random_states(device):
    device.manual_seed(7)
    state = device.get_rng_state()
    first = torch.rand(4, device=device.current_device_name())
    device.set_rng_state(state)
    assert torch.equal(first, torch.rand(4, device=device.current_device_name()))
    device.manual_seed_all(7)
    assert torch.equal(first, torch.rand(4, device=device.current_device_name())) and device.initial_seed() == 7
    assert isinstance(device.default_generator(0), torch.Generator) and device.random() is torch.random


def test_streams_and_events(device):
    begin, end = device.Event(enable_timing=True), device.Event(enable_timing=True)
    with device.stream(device.Stream()):
        begin.record()
        torch.ones(1000, device=device.current_device_name()).sum()
        end.record()
    end.synchronize()
    device.synchronize()
    assert begin.elapsed_time(end) >= 0 and end.query()
    device.current_stream().synchronize()
    assert device.default_stream() is not None


def test_memory(device):
    device.reset_peak_memory_stats()
    before = device.memory_allocated()
    block = torch.ones(64 << 20, dtype=torch.uint8, device=device.current_device_name())
    held = device.memory_allocated()
    slack = 1 << 20  # the kernel's counters lag a few pages
    assert held - before > 60 << 20 and device.max_memory_allocated() >= held - slack and device.memory_reserved() >= held - slack
    del block
    device.empty_cache()
    assert device.memory_allocated() < held - (32 << 20)
    assert device.max_memory_allocated() >= held - slack
    device.reset_peak_memory_stats()
    assert device.max_memory_allocated() < held
    assert 0 < device.available_memory() <= device.total_memory() and device.memory_stats()


def test_pinning(device):
    values = torch.arange(6.0).view(2, 3)
    copy = device.pin_memory(values)
    assert torch.equal(copy, values) and device.is_pinned(copy)
    empty = device.pin_memory(values, make_copy=False)
    assert empty.shape == (2, 3) and empty.dtype == values.dtype
    flat = device.pin_memory(values, match_shape=False)
    assert flat.shape == (6,) and flat.tolist() == list(range(6))
    assert device.pin_empty(3, 2, dtype=torch.bfloat16).shape == (3, 2)


def test_compile_backend(device):
    assert device.get_compile_backend() == "inductor"
    device.set_compile_backend("eager")
    assert device.get_compile_backend() == "eager"
    with pytest.raises(ValueError, match="'no_such' is unknown"):
        device.set_compile_backend("no_such")


def test_the_rest(device):
    called = []
    device.lazy_call(lambda: called.append(1))
    assert called
    device.range_push("x")
    device.range_pop()
    device.set_device(0)
    with device.device(0):
        pass
    assert device.op_builder_dir() == "deepspeed.ops.op_builder"
