# SPDX-License-Identifier: Apache-2.0
"""`cfg.zero_optimization.stage`: the resolved configuration as frozen attributes."""
import logging
import os

from . import auto
from .native import DeepSpeedConfigError, reader
from .world import World, find_world

_aliases = reader.aliases()


def _plain(value):
    """A copy of dicts and lists all the way down; the leaves themselves (a tensor, a class) are shared."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value


class Section:
    """A frozen section: keys are attributes, and it can be read like a dict. Other spellings of a key work too.

    Free-form parts (`optimizer.params`) and lists come out as fresh copies, so that nobody can change the configuration by accident.
    """

    def __init__(self, path, values):
        object.__setattr__(self, "_path", path)
        object.__setattr__(self, "_names", tuple(values))
        for name, value in values.items():
            here = f"{path}.{name}" if path else name
            if isinstance(value, dict) and here not in _FREE_FORM:
                value = Section(here, value)
            if isinstance(value, (dict, list)):
                object.__setattr__(self, "_free", {**self.__dict__.get("_free", {}), name: value})
            else:
                object.__setattr__(self, name, value)

    def __getattr__(self, name):
        # Only reached for names that are no plain attribute.
        if not name.startswith("__"):
            free = self.__dict__.get("_free", {})
            if name in free:
                return _plain(free[name])
            path = self.__dict__.get("_path", "")
            other = _aliases.get(path, {}).get(name)
            if other is not None:
                return getattr(self, other)
            raise AttributeError(f"no key {path + '.' if path else ''}{name} in the configuration")
        raise AttributeError(name)

    def __setattr__(self, name, value):
        raise AttributeError(f"the configuration is frozen; {self._path or 'config'}.{name} cannot be set")

    def __delattr__(self, name):
        raise AttributeError(f"the configuration is frozen; {self._path or 'config'}.{name} cannot be deleted")

    def __getitem__(self, name):
        try:
            return getattr(self, name)
        except AttributeError:
            raise KeyError(name) from None

    def __contains__(self, name):
        return name in self._names

    def __iter__(self):
        return iter(self._names)

    def __len__(self):
        return len(self._names)

    def __eq__(self, other):
        return self.to_dict() == other.to_dict() if isinstance(other, Section) else NotImplemented

    __hash__ = None

    def __dir__(self):
        return [*super().__dir__(), *self._names]

    def keys(self):
        return self._names

    def values(self):
        return [getattr(self, name) for name in self._names]

    def items(self):
        return [(name, getattr(self, name)) for name in self._names]

    def get(self, name, default=None):
        return getattr(self, name, default)

    def to_dict(self):
        """Plain nested dicts with every key."""
        return {name: value.to_dict() if isinstance(value, Section) else value for name, value in self.items()}

    def __deepcopy__(self, memo):
        return self

    def __reduce__(self):
        return (Section, (self._path, self.to_dict()))

    def __repr__(self):
        inside = ", ".join(f"{name}={value!r}" for name, value in self.items())
        return f"{type(self).__name__}({inside})"


# Paths whose value is the user's own dict.
_FREE_FORM = frozenset({
    "optimizer.params", "scheduler.params", "autotuning.arg_mappings", "weight_quantization.quantized_initialization",
    "weight_quantization.post_init_quant", "data_efficiency.data_sampling.curriculum_learning.curriculum_metrics", "inference"
})


class Config(Section):
    """The whole configuration, resolved and frozen.

    raw: what the caller gave, never changed (the same object if it was a dict; the parsed document if it was a path or text).
    source: the path, or what else the document came from. warnings: what was said about it.
    data_parallel_world_size: ranks that see different samples.
    """

    def __init__(self, loaded):
        super().__init__("", loaded["values"])
        for name in ("raw", "source", "data_parallel_world_size"):
            object.__setattr__(self, name, loaded[name])
        object.__setattr__(self, "warnings", tuple(text for _, text in loaded["remarks"]))
        object.__setattr__(self, "_loaded", loaded)

    def is_set(self, path):
        """Whether the user gave this key, under any of its spellings, with a value other than None and "auto"."""
        canonical = reader.canonical_path(path)
        if not canonical:
            raise KeyError(f"no key {path!r} in the configuration")
        return canonical in self._loaded["given"]

    def __reduce__(self):
        return (Config, (self._loaded,))

    def __repr__(self):
        given = {path: self._at(path) for path in sorted(self._loaded["given"]) if not isinstance(self._at(path), Section)}
        inside = ", ".join(f"{path}={value!r}" for path, value in given.items())
        return f"Config({self.source}; {inside})"

    def _at(self, path):
        value = self
        for name in path.split("."):
            value = value[name] if name in value else None
            if not isinstance(value, (Section, dict)):
                return value
        return value


def _report(remarks):
    """On rank 0, each remark once in a process, however often a file is loaded."""
    if not remarks:
        return
    from deepspeed.telemetry.logs import log_dist_once
    for level, text in remarks:
        log_dist_once(f"config: {text}", level=logging.WARNING if level == "warning" else logging.INFO)


def load_config(source, world_size=None, *, strict=None, device="cpu", batch_required=True, mpu=None, mesh_device=None,
                accept_unbuilt=False):
    """Reads and checks a configuration; raises DeepSpeedConfigError naming everything that is wrong.

    source: a dict (or other mapping), a path, JSON text, base64 text of JSON, or a Config, which is handed back.
    world_size: data-parallel ranks before `sequence_parallel_size` is counted; by default found from mesh_device, mpu,
        torch.distributed if it is initialised, or WORLD_SIZE.
    strict: unknown keys are errors everywhere; by default as the document's own "strict" says.
    device: "cpu" or "cuda", where training will happen; some values can be honoured on one only.
    batch_required: False accepts a document without batch sizes, for readers that only place parameters.
    accept_unbuilt: True accepts features that this release does not have, for readers that only plan.
    """
    if isinstance(source, Config):
        return source
    if isinstance(source, os.PathLike):
        source = os.fspath(source)
    if not isinstance(source, str) and not (hasattr(source, "keys") and hasattr(source, "items")):
        raise TypeError(f"config must be a dict, a path, or base64 text, found {type(source).__name__}")
    world = find_world(mpu, mesh_device) if world_size is None else World(int(world_size), "the argument world_size")
    try:
        loaded = reader.load(source, world=reader.World(*world), device=device, strict=strict, batch_required=batch_required,
                             **({"accept_unbuilt": True} if accept_unbuilt else {}))
    except DeepSpeedConfigError as error:
        more = auto.hint(source, ("train_batch_size", "train_micro_batch_size_per_gpu")) if "both missing" in str(error) else ""
        if not more:
            raise
        raise DeepSpeedConfigError(f"{error}{more}") from None
    _report(loaded["remarks"])
    return Config(loaded)
