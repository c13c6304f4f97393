# SPDX-License-Identifier: Apache-2.0
"""What every monitor has in common."""
import abc
import importlib
import os
import weakref

from deepspeed.telemetry.logs import current_rank, logger


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


_in_use = weakref.WeakValueDictionary()  # (section, folder) -> the monitor of this process that writes there


def own_folder(monitor, section):
    """Makes `<output_path>/<job_name>` for a monitor of that section. While another one of this process writes there, as a second
    engine with the same configuration makes it, the name gets a number, so that two curves do not become one."""
    base = os.path.join(monitor.output_path or "", monitor.job_name)
    folder, others = base, 1
    while (section, os.path.abspath(folder)) in _in_use:
        others += 1
        folder = f"{base}_{others}"
    if others > 1:
        logger.warning(f"{section}.job_name: another engine of this process writes to {base!r}; this one writes to {folder!r}. "
                       f"Give each engine a {section}.job_name of its own")
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise cannot_write(section, folder, error) from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise cannot_write(section, folder, "no permission to write")
    _in_use[section, os.path.abspath(folder)] = monitor
    return folder


def release_folder(monitor):
    """The monitor has closed: the next one with its names appends to what it wrote."""
    for key, owner in list(_in_use.items()):
        if owner is monitor:
            del _in_use[key]


def cannot_write(section, path, error):
    return OSError(f"{section}.output_path: {path!r} cannot be written ({error}): name a folder that the user of rank 0 may write to")


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
