# SPDX-License-Identifier: Apache-2.0
"""Running a function without keeping its activations, on torch.utils.checkpoint.

torch restores the usual random states (host and device) for the second run. The tracked ones (deepspeed.checkpointing.rng) are
ours to restore: the second run starts from the states the first one started from, and afterwards the states are as before.
"""
import contextlib

import torch
import torch.utils.checkpoint
from torch.utils.checkpoint import CheckpointFunction  # noqa: F401

from deepspeed.checkpointing.configuration import options
from deepspeed.checkpointing.rng import get_cuda_rng_tracker
from deepspeed.device.select import get_accelerator
from deepspeed.telemetry.logs import log_dist


@contextlib.contextmanager
def _boundary(what):
    """What the options `synchronize` and `profile` ask for, around one run of the function."""
    chosen = options()
    device = get_accelerator()
    if chosen.synchronize:
        device.synchronize()
    if chosen.profile:
        begin, end = device.Event(enable_timing=True), device.Event(enable_timing=True)
        begin.record()
    yield
    if chosen.profile:
        end.record()
        end.synchronize()
        log_dist(f"activation checkpointing: {what} took {begin.elapsed_time(end):.2f} ms")
    if chosen.synchronize:
        device.synchronize()


@contextlib.contextmanager
def _tracked_states(states):
    """Runs with the tracked random states of then, and puts those of now back."""
    tracker = get_cuda_rng_tracker()
    now = tracker.get_states()
    tracker.set_states({name: state.clone() for name, state in states.items()})
    try:
        yield
    finally:
        tracker.set_states(now)


@contextlib.contextmanager
def _second_run(states):
    with _boundary("recomputation"), _tracked_states(states):
        yield


class _Replayed:
    """The function as torch calls it: the first call is forward, every later one a recomputation."""

    def __init__(self, function, keywords):
        self.function = function
        self.keywords = keywords  # names of the last positional arguments
        self.states = get_cuda_rng_tracker().get_states()
        self.ran = False

    def __call__(self, *args):
        cut = len(args) - len(self.keywords)
        context = _second_run(self.states) if self.ran else _boundary("forward")
        self.ran = True
        with context:
            return self.function(*args[:cut], **dict(zip(self.keywords, args[cut:])))


def checkpoint(function, *args, **kwargs):
    """function(*args, **kwargs), its activations recomputed in backward (torch's reentrant kind).

    At least one tensor among the arguments must require a gradient, or nothing inside gets one.
    """
    replayed = _Replayed(function, list(kwargs))
    return torch.utils.checkpoint.checkpoint(replayed, *args, *kwargs.values(), use_reentrant=True)


def non_reentrant_checkpoint(function, *args, **kwargs):
    """The same by saved-tensor hooks: works with inputs that need no gradient and with torch.autograd.grad."""
    states = get_cuda_rng_tracker().get_states()
    return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=False,
                                             context_fn=lambda: (_boundary("forward"), _second_run(states)), **kwargs)
