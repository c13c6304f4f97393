# SPDX-License-Identifier: Apache-2.0
"""An NVIDIA GPU as the device. Nothing here makes a CUDA context before a tensor or a stream is asked for."""
import importlib.util
import os

import torch

from deepspeed.device.interface import DeepSpeedAccelerator


class CUDA_Accelerator(DeepSpeedAccelerator):
    _name = "cuda"
    _communication_backend_name = "nccl"

    def __init__(self):
        # torch then counts devices through NVML, which leaves the process free to fork.
        os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

    def is_available(self):
        return torch.cuda.is_available()

    def device_count(self):
        return torch.cuda.device_count()

    def device_name(self, device_index=None):
        return "cuda" if device_index is None else f"cuda:{int(device_index)}"

    def device(self, device_index=None):
        return torch.cuda.device(device_index)

    def set_device(self, device_index):
        torch.cuda.set_device(device_index)

    def current_device(self):
        return torch.cuda.current_device()

    def current_device_name(self):
        return f"cuda:{torch.cuda.current_device()}"

    def synchronize(self, device_index=None):
        torch.cuda.synchronize(device_index)

    # ---- random numbers
    def set_rng_state(self, new_state, device_index=None):
        torch.cuda.set_rng_state(new_state, self._index(device_index))

    def get_rng_state(self, device_index=None):
        return torch.cuda.get_rng_state(self._index(device_index))

    def manual_seed(self, seed):
        return torch.cuda.manual_seed(seed)

    def manual_seed_all(self, seed):
        return torch.cuda.manual_seed_all(seed)

    def initial_seed(self):
        return torch.cuda.initial_seed()

    def default_generator(self, device_index):
        torch.cuda.init()  # the tuple of generators is empty before
        return torch.cuda.default_generators[device_index]

    def _index(self, device_index):
        return torch.cuda.current_device() if device_index is None else device_index

    # ---- streams and events
    @property
    def Stream(self):
        return torch.cuda.Stream

    def stream(self, stream):
        return torch.cuda.stream(stream)

    def current_stream(self, device_index=None):
        return torch.cuda.current_stream(device_index)

    def default_stream(self, device_index=None):
        return torch.cuda.default_stream(device_index)

    @property
    def Event(self):
        return torch.cuda.Event

    # ---- memory
    def empty_cache(self):
        torch.cuda.empty_cache()

    def memory_allocated(self, device_index=None):
        return torch.cuda.memory_allocated(device_index)

    def max_memory_allocated(self, device_index=None):
        return torch.cuda.max_memory_allocated(device_index)

    def reset_peak_memory_stats(self, device_index=None):
        torch.cuda.reset_peak_memory_stats(device_index)

    def memory_reserved(self, device_index=None):
        return torch.cuda.memory_reserved(device_index)

    def max_memory_reserved(self, device_index=None):
        return torch.cuda.max_memory_reserved(device_index)

    def memory_stats(self, device_index=None):
        return torch.cuda.memory_stats(device_index)

    def total_memory(self, device_index=None):
        return torch.cuda.get_device_properties(self._index(device_index)).total_memory

    def available_memory(self, device_index=None):
        return torch.cuda.mem_get_info(device_index)[0]

    # ---- number types
    def is_bf16_supported(self):
        return torch.cuda.is_bf16_supported()

    def is_fp16_supported(self):
        return torch.cuda.get_device_capability() >= (7, 0)

    def is_triton_supported(self):
        return importlib.util.find_spec("triton") is not None and torch.cuda.get_device_capability() >= (8, 0)

    # ---- host memory
    def pin_memory(self, tensor, make_copy=True, match_shape=True):
        if make_copy and match_shape and tensor.device.type == "cpu":
            return tensor.pin_memory()
        return self._host_copy(tensor, make_copy, match_shape, pinned=True)

    def pin_empty(self, *size, dtype, device="cpu"):
        return torch.empty(*size, dtype=dtype, device=device, pin_memory=True)

    def is_pinned(self, tensor):
        return tensor.is_pinned()

    # ---- profiling, graphs
    def range_push(self, msg, domain=None, category=None):
        torch.cuda.nvtx.range_push(msg)

    def range_pop(self, domain=None):
        torch.cuda.nvtx.range_pop()

    def lazy_call(self, callback):
        torch.cuda._lazy_call(callback)

    def create_graph(self):
        return torch.cuda.CUDAGraph()

    def capture_to_graph(self, graph, pool=None, stream=None):
        return torch.cuda.graph(graph, pool=pool, stream=stream)

    def replay_graph(self, graph):
        graph.replay()

    # ---- processes
    def export_envs(self):
        return ["NCCL"]

    def visible_devices_envs(self):
        return ["CUDA_VISIBLE_DEVICES"]

    def set_visible_devices_envs(self, current_env, local_accelerator_ids):
        current_env["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, local_accelerator_ids))
