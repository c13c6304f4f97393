# SPDX-License-Identifier: Apache-2.0
"""Options of activation checkpointing, set once per process by `configure`."""
from dataclasses import dataclass, replace

from deepspeed.comm.mpu import bwc_tensor_model_parallel_world_size


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
    options = Options()
    configured = False


# Keys of the JSON section and what they are called here.
_SECTION = {
    "partition_activations": "partition_activations",
    "contiguous_memory_optimization": "contiguous_checkpointing",
    "number_checkpoints": "num_checkpoints",
    "cpu_checkpointing": "checkpoint_in_cpu",
    "synchronize_checkpoint_boundary": "synchronize",
    "profile": "profile",
}


def options():
    return _State.options


def is_configured():
    """Whether `configure` has been called."""
    return _State.configured


def configure(mpu_, deepspeed_config=None, partition_activations=None, contiguous_checkpointing=None, num_checkpoints=None,
              checkpoint_in_cpu=None, synchronize=None, profile=None):
    """Sets the options: first from the configuration's `activation_checkpointing` section, then from the arguments given.

    mpu_: the model parallel unit, None for a model that is not split.
    deepspeed_config: path, dict or configuration object.
    synchronize: wait for the device at the ends of every checkpointed function. profile: log the time of each.
    """
    values = dict(mpu=mpu_, **_from_config(deepspeed_config))
    given = dict(partition_activations=partition_activations, contiguous_checkpointing=contiguous_checkpointing,
                 num_checkpoints=num_checkpoints, checkpoint_in_cpu=checkpoint_in_cpu, synchronize=synchronize, profile=profile)
    values.update({key: value for key, value in given.items() if value is not None})
    _accept(Options(**values))


def _accept(new):
    _check(new)
    _State.options = new
    _State.configured = True


def _from_config(config):
    if config is None:
        return {}
    section = getattr(config, "activation_checkpointing", None) or getattr(config, "activation_checkpointing_config", None)
    if section is None:
        from deepspeed.config import load_config

        section = load_config(config, batch_required=False).activation_checkpointing
    return {ours: getattr(section, key) for key, ours in _SECTION.items()}


def _check(new):
    if new.contiguous_checkpointing and not new.partition_activations:
        raise ValueError("contiguous_checkpointing (contiguous_memory_optimization) needs partition_activations")
    if new.contiguous_checkpointing and new.num_checkpoints is None:
        raise ValueError("contiguous_checkpointing (contiguous_memory_optimization) needs num_checkpoints (number_checkpoints)")
    if new.partition_activations and bwc_tensor_model_parallel_world_size(new.mpu) > 1:
        raise NotImplementedError("partition_activations over model parallel ranks is not built yet; on one model parallel rank it "
                                  "is accepted, since there is nothing to partition")
    if new.checkpoint_in_cpu:
        raise NotImplementedError("checkpoint_in_cpu (cpu_checkpointing) is not built yet: checkpointed inputs stay on the device")


def reset():
    """Forgets what a pass left behind. Nothing is kept between passes, so there is nothing to do."""


def set_num_layers(nlayers):
    """Number of checkpoints of a pass."""
    _State.options = replace(_State.options, num_checkpoints=nlayers)


def partition_activations_in_checkpoint(partition_activation):
    """Turns partition_activations on or off."""
    changed = replace(_State.options, partition_activations=partition_activation)
    _check(changed)
    _State.options = changed
