# SPDX-License-Identifier: Apache-2.0
"""The inputs of checkpointed layers on the host, for models that call torch's checkpoint by themselves, as those of Hugging Face do.

    with get_checkpoint_hidden_states_offloading_ctx_manager():
        loss = model(**batch).loss
    loss.backward()

Only what torch.utils.checkpoint (or deepspeed.checkpointing) saves as the input of a layer is moved; every other saved tensor, and everything
on a CPU, stays where it is.
"""
import sys
import weakref
from collections import deque

import torch

from deepspeed.checkpointing.host import HostCopies, Line

_SAVERS = ("torch.utils.checkpoint", "deepspeed.checkpointing.recompute")


def _saved_by_a_checkpoint():
    frame = sys._getframe(2)  # 0: this, 1: the hook, 2: whoever makes autograd save
    while frame is not None and frame.f_globals.get("__name__") == "torch.autograd.function":
        frame = frame.f_back
    return frame is not None and frame.f_globals.get("__name__") in _SAVERS


def _on_the_device(tensor):
    return tensor.device.type not in ("cpu", "meta")


class _Saved:
    """One saved tensor: on the device, on its way, on the host."""

    def __init__(self, tensor):
        self.device_tensor, self.version = tensor, tensor._version
        self.host, self.copies = None, None

    def start(self, line, pinned):
        source = self.device_tensor
        self.host = torch.empty_like(source, device="cpu", pin_memory=pinned)
        self.copies = HostCopies(line)
        self.copies.put(source, self.host)

    def settle(self):
        self.copies.settle()
        changed = self.device_tensor._version != self.version
        self.device_tensor = None
        if changed:
            raise RuntimeError("the input of a checkpointed layer was changed in place while it was copied to the host: change a copy of "
                               "it, or leave get_checkpoint_hidden_states_offloading_ctx_manager() out")

    def get(self):
        return self.device_tensor if self.device_tensor is not None else self.copies.bring()[0]


class CheckpointHiddenStatesOffload(torch.autograd.graph.saved_tensors_hooks):
    """Context manager around forward. keep_last_count inputs stay on the device, since backward needs them first; at most
    max_fwd_stash_count more are on their way to the host at a time."""

    def __init__(self, use_pin_memory=True, use_streams=True, min_offload_bytes=1024, max_fwd_stash_count=2, max_cpu_buffer_pool_count=64,
                 keep_last_count=1):
        for name, value, least in (("min_offload_bytes", min_offload_bytes, 0), ("max_fwd_stash_count", max_fwd_stash_count, 0),
                                   ("keep_last_count", keep_last_count, 0), ("max_cpu_buffer_pool_count", max_cpu_buffer_pool_count, 0)):
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name}: expected an integer of at least {least}, got {value!r}")
        self._pinned, self._smallest = use_pin_memory, min_offload_bytes
        self._line = Line(own_stream=use_streams)
        self._stash, self._keep = max_fwd_stash_count, keep_last_count
        self._kept, self._leaving = deque(), deque()
        super().__init__(self._pack, lambda saved: saved.get() if isinstance(saved, _Saved) else saved)

    def _pack(self, tensor):
        wanted = (tensor.is_floating_point() and tensor.nbytes >= self._smallest and type(tensor) is torch.Tensor and _on_the_device(tensor)
                  and _saved_by_a_checkpoint())
        if not wanted:
            return tensor
        saved = _Saved(tensor)
        self._kept.append(weakref.ref(saved))
        while len(self._kept) > self._keep:
            leaving = self._kept.popleft()()
            if leaving is not None:
                leaving.start(self._line, self._pinned)
                self._leaving.append(leaving)
        self._settle(self._stash)
        return saved

    def _settle(self, left):
        while len(self._leaving) > left:
            self._leaving.popleft().settle()

    def __enter__(self):
        super().__enter__()
        return self

    def __exit__(self, *error):
        super().__exit__(*error)
        self._kept.clear()
        self._settle(0)


def get_checkpoint_hidden_states_offloading_ctx_manager(use_pin_memory=True, use_streams=True, min_offload_bytes=1024,
                                                        max_fwd_stash_count=2, max_cpu_buffer_pool_count=64, keep_last_count=1):
    """A CheckpointHiddenStatesOffload. max_cpu_buffer_pool_count has no effect: pinned memory is kept by torch's own allocator."""
    return CheckpointHiddenStatesOffload(use_pin_memory, use_streams, min_offload_bytes, max_fwd_stash_count, max_cpu_buffer_pool_count,
                                         keep_last_count)
