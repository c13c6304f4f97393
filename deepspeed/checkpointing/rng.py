# SPDX-License-Identifier: Apache-2.0
"""Named random states of the device, so that dropout can be equal on all model parallel ranks here and different there."""
import contextlib

from deepspeed.comm.mpu import bwc_tensor_model_parallel_rank
from deepspeed.device.select import get_accelerator

_MODEL_PARALLEL = "model-parallel-rng"
_MODEL_PARALLEL_OFFSET = 2718  # as Megatron-LM has it, so that seeds give the streams its users know


class CudaRNGStatesTracker:
    """Named random states. Inside `fork(name)` the device draws from that state and leaves its usual one untouched."""

    def __init__(self):
        self.reset()

    def reset(self):
        self.states_ = {}
        self.seeds_ = set()

    def get_states(self):
        """A copy of the dict of states."""
        return {name: state.clone() for name, state in self.states_.items()}

    def set_states(self, states):
        self.states_ = states

    def add(self, name, seed):
        """A new state `name` that starts from `seed`."""
        if seed in self.seeds_:
            raise RuntimeError(f"seed {seed} is in use already: two states would draw the same numbers")
        if name in self.states_:
            raise RuntimeError(f"random state {name!r} exists already")
        device = get_accelerator()
        usual = device.get_rng_state()
        device.manual_seed(seed)
        self.states_[name] = device.get_rng_state()
        self.seeds_.add(seed)
        device.set_rng_state(usual)

    @contextlib.contextmanager
    def fork(self, name=_MODEL_PARALLEL):
        if name not in self.states_:
            raise RuntimeError(f"random state {name!r} is unknown: add() it, or call model_parallel_cuda_manual_seed()")
        device = get_accelerator()
        usual = device.get_rng_state()
        device.set_rng_state(self.states_[name])
        try:
            yield
        finally:
            self.states_[name] = device.get_rng_state()
            device.set_rng_state(usual)


_tracker = CudaRNGStatesTracker()


def get_cuda_rng_tracker():
    """The tracker of this process."""
    return _tracker


def _tensor_rank():
    from deepspeed.checkpointing.configuration import options

    return bwc_tensor_model_parallel_rank(options().mpu)


def model_parallel_cuda_manual_seed(seed):
    """Seeds the device with `seed` on every rank, and the tracked model parallel state differently on each."""
    _tracker.reset()
    get_accelerator().manual_seed(seed)
    _tracker.add(_MODEL_PARALLEL, seed + _MODEL_PARALLEL_OFFSET + _tensor_rank())


def model_parallel_reconfigure_tp_seed(seed):
    """Starts the model parallel state anew from `seed`, differently on each model parallel rank."""
    device = get_accelerator()
    with _tracker.fork():
        device.manual_seed(seed + _MODEL_PARALLEL_OFFSET + _tensor_rank())
