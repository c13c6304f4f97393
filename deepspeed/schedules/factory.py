# SPDX-License-Identifier: Apache-2.0
"""From the config's ``scheduler`` section to a schedule object."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from typing import Any

from .one_cycle import OneCycle
from .range_test import LRRangeTest
from .schedule import get_torch_optimizer
from .warmup import WarmupCosineLR, WarmupDecayLR, WarmupLR

SCHEDULES = {cls.__name__: cls for cls in (LRRangeTest, OneCycle, WarmupLR, WarmupDecayLR, WarmupCosineLR)}
VALID_LR_SCHEDULES = list(SCHEDULES)

# These cannot be driven by "one step after each update": they want a metric, a Python function or other schedulers.
_NOT_FROM_JSON = {
    "ReduceLROnPlateau": "needs a metric at every step",
    "LambdaLR": "needs a Python function",
    "MultiplicativeLR": "needs a Python function",
    "SequentialLR": "needs other scheduler objects",
    "ChainedScheduler": "needs other scheduler objects",
}


def _error(message: str) -> Exception:
    from deepspeed.config import DeepSpeedConfigError
    return DeepSpeedConfigError(message)


def _nearest(word: str, words: Any) -> str:
    found = difflib.get_close_matches(word, list(words), n=1)
    return f"; did you mean {found[0]!r}?" if found else ""


def _torch_schedulers() -> dict[str, type]:
    from torch.optim import lr_scheduler
    return {
        name: cls
        for name, cls in vars(lr_scheduler).items()
        if inspect.isclass(cls) and issubclass(cls, lr_scheduler.LRScheduler) and not name.startswith("_")
        and name != "LRScheduler"
    }


def _scheduler_class(name: str) -> type:
    if name in SCHEDULES:
        return SCHEDULES[name]
    if name in _NOT_FROM_JSON:
        raise _error(f"scheduler.type: torch's {name} {_NOT_FROM_JSON[name]}, which JSON cannot give; "
                     "build it in Python and pass it as initialize(lr_scheduler=...)")
    torch_classes = _torch_schedulers()
    if name in torch_classes:
        return torch_classes[name]
    raise _error(f"scheduler.type: unknown schedule {name!r}{_nearest(name, [*SCHEDULES, *torch_classes])} "
                 f"(allowed: {', '.join(SCHEDULES)}, or a class of torch.optim.lr_scheduler)")


def _check_params(name: str, cls: type, params: Mapping[str, Any]) -> None:
    accepted = {
        key: parameter
        for key, parameter in list(inspect.signature(cls.__init__).parameters.items())[2:]
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD
    }
    for key in params:
        if key not in accepted:
            raise _error(f"scheduler.params.{key}: {name} has no such parameter{_nearest(key, accepted)} "
                         f"(it has: {', '.join(accepted)})")
    missing = [k for k, p in accepted.items() if p.default is inspect.Parameter.empty and k not in params]
    if missing:
        from deepspeed.config.auto import WHO_FILLS
        raise _error(f"scheduler.params.{missing[0]}: {name} requires it and it is not given"
                     f'; "auto" counts as not given: {WHO_FILLS}')


def build_scheduler(section: Any, optimizer: Any) -> Any:
    """Build the schedule that a config's ``scheduler`` section describes, on the given optimizer.

    ``section`` is a mapping or an object with ``type`` and ``params``. Returns None when no type is set. ``"auto"``
    values count as not given. Errors are ``DeepSpeedConfigError`` and name the JSON path.
    """
    get = section.get if isinstance(section, Mapping) else lambda key: getattr(section, key, None)
    name = get("type") if section is not None else None
    if name is None or name == "auto":
        return None
    cls = _scheduler_class(name)
    params = {key: value for key, value in dict(get("params") or {}).items() if value != "auto"}
    _check_params(name, cls, params)
    try:
        return cls(get_torch_optimizer(optimizer), **params)
    except (TypeError, ValueError) as error:
        raise _error(f"scheduler.params: {name}: {error}") from error
