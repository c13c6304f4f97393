# SPDX-License-Identifier: Apache-2.0
"""The zero_optimization section and its parts as objects of their own, for callers that build them by hand.

They are read by the one reader there is, so keys, defaults and messages are those of a whole configuration.
"""
from deepspeed.config import Section, load_config


def _read(values, *path):
    """`values` as the section at zero_optimization.<path>, resolved."""
    # Parts are read at stage 3, where all of them mean something.
    section = {"stage": 3, path[0]: values} if path else values
    section = load_config({"zero_optimization": section}, world_size=1, batch_required=False).zero_optimization
    for name in path:
        section = getattr(section, name)
    return section


class _Part(Section):
    _inside = ()

    def __init__(self, **values):
        read = _read(values, *self._inside)
        super().__init__(".".join(("zero_optimization", *self._inside)), read.to_dict())


class DeepSpeedZeroConfig(_Part):
    """zero_optimization. `DeepSpeedZeroConfig(stage=3)`"""


class DeepSpeedZeroOffloadParamConfig(_Part):
    """zero_optimization.offload_param."""

    _inside = ("offload_param",)


class DeepSpeedZeroOffloadOptimizerConfig(_Part):
    """zero_optimization.offload_optimizer."""

    _inside = ("offload_optimizer",)


class DeepSpeedZeroLeafModuleConfig(_Part):
    """zero_optimization.leaf_module."""

    _inside = ("leaf_module",)


def get_zero_config(param_dict):
    """The section of a configuration dict; its defaults when it is not there."""
    return DeepSpeedZeroConfig(**param_dict.get("zero_optimization", {}))


def _default(name):
    return list(getattr(_read({}, "leaf_module"), name))


DEFAULT_LEAF_MODULE_CLASSES = _default("classes")
DEFAULT_LEAF_MODULE_NAMES = _default("names")
DEFAULT_LEAF_MODULE_NAME_SUFFIXES = _default("name_suffixes")
