# SPDX-License-Identifier: Apache-2.0
"""Unpickling what only known classes made. A pickle may call any function it names; here it may name a few that do no harm, and the
classes that the caller has allowed."""
import io
import pickle

from deepspeed.telemetry import logger

_KNOWN = {
    "builtins": {"set", "frozenset", "complex", "bytearray", "range", "slice", "object", "list", "dict", "tuple", "int", "float", "str", "bool"},
    "collections": {"OrderedDict", "defaultdict", "deque", "Counter"},
    "datetime": {"datetime", "date", "time", "timedelta", "timezone"},
    "decimal": {"Decimal"},
    "fractions": {"Fraction"},
    "_codecs": {"encode"},
    "pathlib": {"PosixPath", "PurePosixPath", "Path"},
    "argparse": {"Namespace"},
    "types": {"SimpleNamespace"},
    "torch": {"Size", "device", "dtype"},
    "zoneinfo": {"ZoneInfo"},
}
_allowed = set()


def allow_classes(*classes):
    """Lets checkpoints that are loaded from now on contain pickled objects of these classes (or their full names, "module.Class").

    Objects of classes a checkpoint's own format does not know, such as one's own class in client_state, are pickled. Unpickling can
    run code, so allow only classes you would have such an object made of.
    """
    for item in classes:
        _allowed.add(item if isinstance(item, str) else f"{item.__module__}.{item.__qualname__}")


class Unread:
    """Stands where an object was that was not unpickled. Using it raises."""

    def __init__(self, name, why):
        self.__dict__.update(_name=name, _why=why)

    def __getattr__(self, attribute):
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        raise RuntimeError(f"this object of class {self._name} was not read from the checkpoint: {self._why}; call "
                           f"deepspeed.checkpoint.allow_classes({self._name!r}) before loading if you trust it")

    def __repr__(self):
        return f"<{self._name}, not read from the checkpoint: {self._why}>"


class _Refused(pickle.UnpicklingError):
    pass


class _Unpickler(pickle.Unpickler):

    def find_class(self, module, name):
        if name in _KNOWN.get(module, ()) or f"{module}.{name}" in _allowed:
            return super().find_class(module, name)
        raise _Refused(f"it names {module}.{name}, which is not allowed")

    def persistent_load(self, pid):
        raise _Refused("it refers to something outside itself")


def loads(data, name):
    """The object; an Unread, with a warning, when the pickle names what is not allowed."""
    try:
        return _Unpickler(io.BytesIO(data)).load()
    except Exception as error:
        logger.warning(f"checkpoint: an object of class {name} is left out: {error}; if you trust it, call "
                       f"deepspeed.checkpoint.allow_classes({name!r}) before loading")
        return Unread(name, str(error))
