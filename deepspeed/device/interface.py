# SPDX-License-Identifier: Apache-2.0
"""DeepSpeedAccelerator: what the library and its callers may ask of a device.

The abstract members are what differs between kinds of device. Everything written in terms of them stands here once.
`device_index` None always means the current device.
"""
import abc
import importlib
import math

import torch

_OP_BUILDER_PACKAGE = "deepspeed.ops.op_builder"


class DeepSpeedAccelerator(abc.ABC):
    """One kind of device. Subclass it and pass an instance to `set_accelerator` to bring another."""

    _name = None
    _communication_backend_name = None

    # ---- what kind of device it is
    def is_synchronized_device(self):
        """Whether an operation has finished when its call returns."""
        return False

    def use_host_timers(self):
        return self.is_synchronized_device()

    def resolves_data_dependency(self):
        return self.is_synchronized_device()

    def handles_memory_backpressure(self):
        return self.is_synchronized_device()

    @abc.abstractmethod
    def is_available(self):
        """Whether this machine has such a device."""

    @abc.abstractmethod
    def device_count(self):
        """How many processes with one device each this host can hold."""

    # ---- which one
    @abc.abstractmethod
    def device_name(self, device_index=None):
        """"cuda", or "cuda:3" for index 3; an index may come as text from the environment."""

    def device(self, device_index=None):
        """A context manager under which `device_index` is the current device."""
        return torch.device(self.device_name(device_index))

    @abc.abstractmethod
    def set_device(self, device_index): ...

    @abc.abstractmethod
    def current_device(self):
        """Index of the current device."""

    @abc.abstractmethod
    def current_device_name(self):
        """Full name of the current device, fit for torch.device()."""

    @abc.abstractmethod
    def synchronize(self, device_index=None):
        """Blocks until everything queued on the device has run."""

    def on_accelerator(self, tensor):
        """Whether the tensor lives on this kind of device."""
        return tensor.device.type == self._name

    # ---- random numbers
    def random(self):
        return torch.random

    @abc.abstractmethod
    def set_rng_state(self, new_state, device_index=None): ...

    @abc.abstractmethod
    def get_rng_state(self, device_index=None): ...

    @abc.abstractmethod
    def manual_seed(self, seed): ...

    @abc.abstractmethod
    def manual_seed_all(self, seed): ...

    @abc.abstractmethod
    def initial_seed(self): ...

    @abc.abstractmethod
    def default_generator(self, device_index): ...

    # ---- streams and events
    @property
    @abc.abstractmethod
    def Stream(self): ...

    @abc.abstractmethod
    def stream(self, stream):
        """A context manager under which work is queued on `stream`."""

    @abc.abstractmethod
    def current_stream(self, device_index=None): ...

    @abc.abstractmethod
    def default_stream(self, device_index=None): ...

    @property
    @abc.abstractmethod
    def Event(self): ...

    # ---- memory, in bytes
    @abc.abstractmethod
    def empty_cache(self): ...

    @abc.abstractmethod
    def memory_allocated(self, device_index=None): ...

    @abc.abstractmethod
    def max_memory_allocated(self, device_index=None): ...

    @abc.abstractmethod
    def reset_peak_memory_stats(self, device_index=None): ...

    @abc.abstractmethod
    def memory_reserved(self, device_index=None): ...

    @abc.abstractmethod
    def max_memory_reserved(self, device_index=None): ...

    @abc.abstractmethod
    def memory_stats(self, device_index=None): ...

    @abc.abstractmethod
    def total_memory(self, device_index=None): ...

    @abc.abstractmethod
    def available_memory(self, device_index=None): ...

    def reset_max_memory_allocated(self, device_index=None):
        self.reset_peak_memory_stats(device_index)

    def memory_cached(self, device_index=None):
        return self.memory_reserved(device_index)

    def max_memory_cached(self, device_index=None):
        return self.max_memory_reserved(device_index)

    def reset_max_memory_cached(self, device_index=None):
        self.reset_peak_memory_stats(device_index)

    # ---- number types
    @abc.abstractmethod
    def is_bf16_supported(self): ...

    @abc.abstractmethod
    def is_fp16_supported(self): ...

    def is_fp64_supported(self):
        return True

    def supported_dtypes(self):
        """The floating types a model may be trained in."""
        dtypes = [torch.float32]
        if self.is_fp16_supported():
            dtypes.append(torch.float16)
        if self.is_bf16_supported():
            dtypes.append(torch.bfloat16)
        return dtypes

    @abc.abstractmethod
    def is_triton_supported(self): ...

    def _constructor(self, dtype):
        device = self._name

        def construct(*args):
            if len(args) == 1 and not isinstance(args[0], int):
                return torch.tensor(args[0], dtype=dtype, device=device)
            return torch.empty(*args, dtype=dtype, device=device)

        return construct

    @property
    def BFloat16Tensor(self):
        return self._constructor(torch.bfloat16)

    @property
    def HalfTensor(self):
        return self._constructor(torch.float16)

    @property
    def FloatTensor(self):
        return self._constructor(torch.float32)

    @property
    def DoubleTensor(self):
        return self._constructor(torch.float64)

    @property
    def ByteTensor(self):
        return self._constructor(torch.uint8)

    @property
    def IntTensor(self):
        return self._constructor(torch.int32)

    @property
    def LongTensor(self):
        return self._constructor(torch.int64)

    # ---- host memory the device reads directly
    def pin_memory_alignment(self):
        """Byte alignment of pinned memory (a page)."""
        return 4096

    @abc.abstractmethod
    def pin_memory(self, tensor, make_copy=True, match_shape=True):
        """A pinned host tensor of the same type; holds the values if `make_copy`, is flat unless `match_shape`."""

    @abc.abstractmethod
    def pin_empty(self, *size, dtype, device="cpu"):
        """A pinned host tensor with undefined values."""

    @abc.abstractmethod
    def is_pinned(self, tensor): ...

    def _host_copy(self, tensor, make_copy, match_shape, pinned):
        shape = tuple(tensor.shape) if match_shape else (math.prod(tensor.shape),)
        out = torch.empty(shape, dtype=tensor.dtype, device="cpu", pin_memory=pinned)
        if make_copy:
            out.view(tensor.shape).copy_(tensor)
        return out

    # ---- profiling, graphs, compilation
    @abc.abstractmethod
    def range_push(self, msg, domain=None, category=None):
        """Opens a named range in the device's profiler."""

    @abc.abstractmethod
    def range_pop(self, domain=None): ...

    @abc.abstractmethod
    def lazy_call(self, callback):
        """Calls back once the device is initialised."""

    @abc.abstractmethod
    def create_graph(self): ...

    @abc.abstractmethod
    def capture_to_graph(self, graph, pool=None, stream=None): ...

    @abc.abstractmethod
    def replay_graph(self, graph): ...

    def get_compile_backend(self):
        """The torch.compile backend to use."""
        return getattr(self, "_compile_backend", "inductor")

    def set_compile_backend(self, backend):
        known = torch._dynamo.list_backends(exclude_tags=())
        if backend not in known:
            raise ValueError(f"torch.compile backend {backend!r} is unknown here; known: {', '.join(sorted(known))}")
        self._compile_backend = backend

    # ---- processes
    def communication_backend_name(self):
        """The torch.distributed backend for this device."""
        return self._communication_backend_name

    def export_envs(self):
        """Prefixes of variables that remote processes must get."""
        return []

    @abc.abstractmethod
    def visible_devices_envs(self):
        """Names of the variables that restrict which devices a process sees."""

    @abc.abstractmethod
    def set_visible_devices_envs(self, current_env, local_accelerator_ids):
        """Writes these variables into the mapping `current_env`."""

    # ---- compiled operators
    def op_builder_dir(self):
        return _OP_BUILDER_PACKAGE

    def get_op_builder(self, class_name):
        """The builder class of this name, None when there is none."""
        return getattr(importlib.import_module(self.op_builder_dir()), class_name, None)

    def create_op_builder(self, class_name):
        builder = self.get_op_builder(class_name)
        return None if builder is None else builder()

    def build_extension(self):
        from torch.utils.cpp_extension import BuildExtension

        return BuildExtension
