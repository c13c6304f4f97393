# SPDX-License-Identifier: Apache-2.0
"""Options of activation checkpointing, set once per process by `configure`."""
from dataclasses import dataclass, replace

from deepspeed.checkpointing.host import Line
from deepspeed.checkpointing.model_parallel import ModelParallelRanks
from deepspeed.checkpointing.slots import Slots
from deepspeed.comm.mpu import bwc_tensor_model_parallel_group, bwc_tensor_model_parallel_world_size


@dataclass(frozen=True)
class Options:
    mpu: object = None
    partition_activations: bool = False
    contiguous_checkpointing: bool = False
    num_checkpoints: int = None
    checkpoint_in_cpu: bool = False
    synchronize: bool = False
    profile: bool = False


class _State:
    """What this process has configured, and what its checkpoints share."""

    def __init__(self):
        self.accept(Options(), configured=False)

    def accept(self, new, configured=True):
        self.options, self.configured = new, configured
        self._ranks = None
        self.slots = Slots()
        self.line = Line()

    def ranks(self):
        """The model parallel ranks that saved inputs are split over: this one alone without partition_activations."""
        if self._ranks is None:
            self._ranks = ModelParallelRanks(self.options.mpu if self.options.partition_activations else None)
        return self._ranks


_state = _State()


# Keys of the JSON section and what they are called here.
_SECTION = {
    "partition_activations": "partition_activations",
    "contiguous_memory_optimization": "contiguous_checkpointing",
    "number_checkpoints": "num_checkpoints",
    "cpu_checkpointing": "checkpoint_in_cpu",
    "synchronize_checkpoint_boundary": "synchronize",
    "profile": "profile",
}


def state():
    return _state


def options():
    return _state.options


def is_configured():
    """Whether `configure` has been called."""
    return _state.configured


def configure(mpu_, deepspeed_config=None, partition_activations=None, contiguous_checkpointing=None, num_checkpoints=None,
              checkpoint_in_cpu=None, synchronize=None, profile=None):
    """Sets the options: first from the configuration's `activation_checkpointing` section, then from the arguments given.

    mpu_: the model parallel unit (an object with Megatron's methods, or a torch DeviceMesh). None: that of an earlier call; without one
    the model is not split.
    deepspeed_config: path, dict or configuration object.
    partition_activations: each model parallel rank keeps its part of the saved inputs, which must be equal on all of them.
    contiguous_checkpointing: they rest in buffers that are allocated once, for num_checkpoints calls a pass; needs partition_activations.
    checkpoint_in_cpu: they rest on the host. Nothing moves where the host is the device.
    synchronize: wait for the device at the ends of every checkpointed function. profile: log the time of each.

    Raises ValueError or TypeError, and changes nothing, when an option is of no use as it is.
    """
    values = dict(mpu=_state.options.mpu if mpu_ is None else mpu_, **_from_config(deepspeed_config))
    given = dict(partition_activations=partition_activations, contiguous_checkpointing=contiguous_checkpointing,
                 num_checkpoints=num_checkpoints, checkpoint_in_cpu=checkpoint_in_cpu, synchronize=synchronize, profile=profile)
    values.update({key: value for key, value in given.items() if value is not None})
    _accept(Options(**values))


def _accept(new):
    _check(new)
    _state.accept(new)


def _from_config(config):
    if config is None:
        return {}
    section = getattr(config, "activation_checkpointing", None) or getattr(config, "activation_checkpointing_config", None)
    if section is None:
        from deepspeed.config import load_config

        section = load_config(config, batch_required=False).activation_checkpointing
    return {ours: getattr(section, key) for key, ours in _SECTION.items()}


def _check(new):
    for option in ("partition_activations", "contiguous_checkpointing", "checkpoint_in_cpu", "synchronize", "profile"):
        if not isinstance(getattr(new, option), bool):
            raise TypeError(f"{option}: expected True or False, got {getattr(new, option)!r}")
    _check_number(new.num_checkpoints)
    if new.contiguous_checkpointing and not new.partition_activations:
        raise ValueError("contiguous_checkpointing (contiguous_memory_optimization) needs partition_activations")
    if new.contiguous_checkpointing and new.num_checkpoints is None:
        raise ValueError("contiguous_checkpointing (contiguous_memory_optimization) needs num_checkpoints (number_checkpoints)")
    if new.partition_activations and new.mpu is not None:
        _check_mpu(new.mpu)


def _check_number(number):
    if number is not None and (not isinstance(number, int) or isinstance(number, bool)):
        raise TypeError(f"num_checkpoints (number_checkpoints): expected an integer, got {number!r}")
    if number is not None and number < 1:
        raise ValueError(f"num_checkpoints (number_checkpoints): must be at least 1, got {number}")


def _check_mpu(mpu):
    size = bwc_tensor_model_parallel_world_size(mpu)
    if not isinstance(size, int) or size < 1:
        raise ValueError(f"partition_activations: the model parallel unit says it has {size!r} ranks")
    if size > 1 and bwc_tensor_model_parallel_group(mpu) is None:
        raise ValueError(f"partition_activations: the model parallel unit has {size} ranks but no group: it needs "
                         "get_tensor_model_parallel_group() or get_model_parallel_group()")


def reset():
    """Forgets what a pass left behind: preallocated buffers are given back, as soon as nothing that was saved rests in them."""
    _state.slots.clear()
    _state.line = Line()


def set_num_layers(nlayers):
    """Number of checkpoints of a pass."""
    _accept_change(num_checkpoints=nlayers)


def partition_activations_in_checkpoint(partition_activation):
    """Turns partition_activations on or off, for checkpoints made from now on."""
    _accept_change(partition_activations=partition_activation)


def _accept_change(**changes):
    changed = replace(_state.options, **changes)
    _check(changed)
    _state.accept(changed, _state.configured)
