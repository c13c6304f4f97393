# SPDX-License-Identifier: Apache-2.0
"""What a function's second run must find as its first run did: random states and autocast."""
import contextlib

import torch
from torch.utils.checkpoint import get_device_states, set_device_states

from deepspeed.checkpointing.rng import get_cuda_rng_tracker


def _autocast(kind):
    return kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind), torch.is_autocast_cache_enabled()


class Surroundings:
    """Taken before the first run, of the host and of the devices that hold `values`."""

    def __init__(self, values):
        self._host = torch.get_rng_state()
        self._type = next((v.device.type for v in values if isinstance(v, torch.Tensor) and v.device.type not in ("cpu", "meta")), None)
        self._devices, self._states = get_device_states(*values) if self._type else ([], [])
        self._tracked = get_cuda_rng_tracker().get_states()
        self._autocast = [_autocast(kind) for kind in ("cpu", self._type) if kind]

    @contextlib.contextmanager
    def randomness(self):
        """Runs with the random states of then, and puts those of now back."""
        tracker = get_cuda_rng_tracker()
        now = tracker.get_states()
        forked = torch.random.fork_rng(devices=self._devices, device_type=self._type) if self._devices else contextlib.nullcontext()
        host_now = torch.get_rng_state()
        with forked:
            try:
                torch.set_rng_state(self._host)
                if self._devices:
                    set_device_states(self._devices, self._states, device_type=self._type)
                tracker.set_states({name: state.clone() for name, state in self._tracked.items()})
                yield
            finally:
                tracker.set_states(now)
                torch.set_rng_state(host_now)

    @contextlib.contextmanager
    def all(self):
        """Randomness and autocast."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.randomness())
            for then in self._autocast:
                kind, enabled, dtype, cached = then
                if then == _autocast(kind):
                    continue
                stack.enter_context(torch.autocast(kind, enabled=enabled, dtype=dtype, cache_enabled=cached))
            yield
