# SPDX-License-Identifier: Apache-2.0
"""What every monitor has in common."""
import abc
import importlib

from deepspeed.telemetry.logs import current_rank


class Monitor(abc.ABC):
    """Takes events (name, value, step), the value a number and the step a count of samples. Writes on rank 0, elsewhere nothing.

    monitor_config: the section of the configuration, with `enabled` and the keys of docs/config.md.
    """

    def __init__(self, monitor_config):
        self.monitor_config = monitor_config
        self.enabled = monitor_config.enabled

    @property
    def writes(self):
        """Whether events go anywhere from this process."""
        return bool(self.enabled) and not current_rank()

    @abc.abstractmethod
    def write_events(self, event_list): ...

    def close(self):
        """Writes out what is left. The monitor takes no events afterwards."""


def number(value):
    """A float or int of a number or a one-element tensor."""
    return value.item() if hasattr(value, "item") else value


def need_package(module, package, section):
    """The optional module that a section of the configuration needs. ImportError names both and the way out."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{section}.enabled is true, but the Python package {package!r} cannot be imported ({error}): "
                          f"`pip install {package}`, or set {section}.enabled to false") from error
