# SPDX-License-Identifier: Apache-2.0
"""The CPU as the device. Memory figures are those of this process, from /proc."""
import contextlib
import os
import time

import torch

from deepspeed._environment import read
from deepspeed.device.interface import DeepSpeedAccelerator
from deepspeed.device.numa import numa_nodes


class HostEvent:
    """The time at which it was recorded. Nothing is queued on a CPU, so a recorded event has always happened."""

    def __init__(self, enable_timing=False, blocking=False, interprocess=False):
        self._at_s = None

    def record(self, stream=None):
        self._at_s = time.perf_counter()

    def wait(self, stream=None): ...

    def synchronize(self): ...

    def query(self):
        return True

    def elapsed_time(self, end_event):
        """Milliseconds from this event to `end_event`."""
        if self._at_s is None or end_event._at_s is None:
            raise RuntimeError("elapsed_time: both events must have been recorded")
        return (end_event._at_s - self._at_s) * 1000.0


class HostStream:
    """The one order in which a CPU does things. Nothing is ever pending on it."""

    def __init__(self, device=None, priority=0): ...

    def synchronize(self): ...

    def query(self):
        return True

    def wait_event(self, event): ...

    def wait_stream(self, stream): ...

    def record_event(self, event=None):
        event = HostEvent() if event is None else event
        event.record()
        return event


_THE_STREAM = HostStream()


def _proc_bytes(path, key):
    """The "kB" figure behind `key` in a /proc file, in bytes; 0 where there is none."""
    with contextlib.suppress(OSError), open(path) as lines:
        for line in lines:
            if line.startswith(key + ":"):
                return int(line.split()[1]) * 1024
    return 0


class CPU_Accelerator(DeepSpeedAccelerator):
    _name = "cpu"
    _communication_backend_name = "gloo"

    def is_synchronized_device(self):
        return True

    def is_available(self):
        return True

    def device_count(self):
        return read("LOCAL_SIZE") or max(1, len(numa_nodes()))

    def device_name(self, device_index=None):
        return "cpu"

    def device(self, device_index=None):
        return contextlib.nullcontext()

    def set_device(self, device_index): ...

    def current_device(self):
        return read("LOCAL_RANK") or 0

    def current_device_name(self):
        return "cpu"

    def synchronize(self, device_index=None): ...

    # ---- random numbers
    def set_rng_state(self, new_state, device_index=None):
        torch.set_rng_state(new_state)

    def get_rng_state(self, device_index=None):
        return torch.get_rng_state()

    def manual_seed(self, seed):
        return torch.manual_seed(seed)

    def manual_seed_all(self, seed):
        return torch.manual_seed(seed)

    def initial_seed(self):
        return torch.initial_seed()

    def default_generator(self, device_index):
        return torch.default_generator

    # ---- streams and events
    @property
    def Stream(self):
        return HostStream

    def stream(self, stream):
        return contextlib.nullcontext(stream)

    def current_stream(self, device_index=None):
        return _THE_STREAM

    def default_stream(self, device_index=None):
        return _THE_STREAM

    @property
    def Event(self):
        return HostEvent

    # ---- memory: "allocated" and "reserved" are both what the process has resident
    def empty_cache(self): ...

    def memory_allocated(self, device_index=None):
        return _proc_bytes("/proc/self/status", "VmRSS")

    def max_memory_allocated(self, device_index=None):
        # The kernel counts lazily: the recorded peak may lag a few pages behind the present figure.
        return max(_proc_bytes("/proc/self/status", "VmHWM"), self.memory_allocated())

    def reset_peak_memory_stats(self, device_index=None):
        with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as control:
            control.write("5")  # proc(5): resets VmHWM to the present VmRSS

    def memory_reserved(self, device_index=None):
        return self.memory_allocated(device_index)

    def max_memory_reserved(self, device_index=None):
        return self.max_memory_allocated(device_index)

    def memory_stats(self, device_index=None):
        return {
            "allocated_bytes.all.current": self.memory_allocated(),
            "allocated_bytes.all.peak": self.max_memory_allocated(),
        }

    def total_memory(self, device_index=None):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

    def available_memory(self, device_index=None):
        return _proc_bytes("/proc/meminfo", "MemAvailable")

    # ---- number types
    def is_bf16_supported(self):
        return True

    def is_fp16_supported(self):
        return True

    def is_triton_supported(self):
        return False

    # ---- host memory: there is no second device to pin it for
    def pin_memory(self, tensor, make_copy=True, match_shape=True):
        return tensor if make_copy and match_shape else self._host_copy(tensor, make_copy, match_shape, pinned=False)

    def pin_empty(self, *size, dtype, device="cpu"):
        return torch.empty(*size, dtype=dtype, device=device)

    def is_pinned(self, tensor):
        return tensor.device.type == "cpu"

    # ---- profiling, graphs
    def range_push(self, msg, domain=None, category=None): ...

    def range_pop(self, domain=None): ...

    def lazy_call(self, callback):
        callback()

    def create_graph(self):
        return None

    def capture_to_graph(self, graph, pool=None, stream=None):
        return contextlib.nullcontext()

    def replay_graph(self, graph):
        raise RuntimeError("a CPU has no graphs to replay: run the captured function itself")

    # ---- processes
    def visible_devices_envs(self):
        return ["CUDA_VISIBLE_DEVICES"]

    def set_visible_devices_envs(self, current_env, local_accelerator_ids): ...
