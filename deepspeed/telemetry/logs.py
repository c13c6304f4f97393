# SPDX-License-Identifier: Apache-2.0
"""The library's logger, "DeepSpeed": silent below WARNING unless told otherwise; every line names its rank. No torch.

Note [Who logs]: lines come from rank 0, or a lone process, so that N ranks do not say the same thing N times. Errors, lines for
which `ranks` was named, and everything at level DEBUG come from any rank.
"""
import json
import logging
import os
import sys

from deepspeed._environment import read

_FORMAT = "[%(asctime)s] [%(levelname)s] [rank %(rank)s] [%(filename)s:%(lineno)d:%(funcName)s] %(message)s"
REPORT = 35  # between WARNING and ERROR: lines that the configuration asked for, such as progress every steps_per_print
logging.addLevelName(REPORT, "REPORT")
_LEVELS = {name: getattr(logging, name.upper()) for name in ("debug", "info", "warning", "error", "critical")}


def current_rank():
    """This process's rank, from the process group if there is one, else from the environment; None for a lone process."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank()
    return read("RANK")


_CHOSEN = {"rank_chosen": True}  # somebody has decided already that this rank speaks


class _RankFilter(logging.Filter):
    def filter(self, record):
        rank = current_rank()
        record.rank = "-" if rank is None else rank
        return not rank or record.levelno >= logging.ERROR or getattr(record, "rank_chosen", False) or logger.level <= logging.DEBUG


class _Logger(logging.Logger):
    """A logger that can say something once."""

    def __init__(self, name, level=logging.NOTSET):
        super().__init__(name, level)
        self._said = set()

    def warning_once(self, message, *args, **kwargs):
        """Logs a warning the first time this very message is passed."""
        key = (message, args)
        if key not in self._said:
            self._said.add(key)
            kwargs.setdefault("stacklevel", 2)
            self.warning(message, *args, **kwargs)


def _make_logger():
    manager = logging.Logger.manager
    with_class, manager.loggerClass = manager.loggerClass, _Logger
    try:
        made = logging.getLogger("DeepSpeed")
    finally:
        manager.loggerClass = with_class
    made.setLevel(logging.WARNING)
    made.propagate = False
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(_FORMAT))
    handler.addFilter(_RankFilter())
    made.addHandler(handler)
    return made


logger = _make_logger()


def _speaks_here(ranks):
    """ranks None is rank 0; [-1] is every rank; a lone process always speaks."""
    rank = current_rank()
    if rank is None:
        return True
    ranks = [0] if not ranks else ranks
    return -1 in ranks or rank in ranks


def log_dist(message, ranks=None, level=logging.INFO):
    """Logs `message` on the given ranks: None is rank 0, [-1] every rank."""
    if _speaks_here(ranks):
        logger.log(level, message, stacklevel=2, extra=_CHOSEN)


def report(message, ranks=None):
    """`log_dist` of a line the user asked for: it comes out unless the level is ERROR or above."""
    if _speaks_here(ranks):
        logger.log(REPORT, message, stacklevel=2, extra=_CHOSEN)


def log_dist_once(message, ranks=None, level=logging.INFO):
    """`log_dist`, the first time this message is passed in this process."""
    key = ("log_dist_once", message)
    if key not in logger._said and _speaks_here(ranks):
        logger._said.add(key)
        logger.log(level, message, stacklevel=2, extra=_CHOSEN)


def print_dist(message, ranks=None):
    """Prints `message` on the given ranks, whatever the log level."""
    if _speaks_here(ranks):
        sys.stdout.write(f"{message}\n")
        sys.stdout.flush()


def print_json_dist(message, ranks=None, path=None):
    """Writes the dict `message` as JSON into the file `path`, together with the rank, on the given ranks."""
    if not _speaks_here(ranks):
        return
    record = dict(message, rank=current_rank() or 0)
    with open(path, "w") as out:
        json.dump(record, out)
        out.flush()
        os.fsync(out.fileno())


def get_log_level_from_string(log_level_str):
    level = _LEVELS.get(str(log_level_str).lower())
    if level is None:
        raise ValueError(f"log level {log_level_str!r} is unknown; one of {', '.join(_LEVELS)} is")
    return level


def set_log_level_from_string(log_level_str, custom_logger=None):
    """Sets the level of our logger, or of `custom_logger`, by name."""
    (custom_logger or logger).setLevel(get_log_level_from_string(log_level_str))


def get_current_level():
    return logger.getEffectiveLevel()


def should_log_le(max_log_level_str):
    """Whether the logger's level is at most the named one, that is, whether lines of that level come out."""
    return get_current_level() <= get_log_level_from_string(max_log_level_str)


def get_caller_func(frame=3):
    """Name of the function `frame` calls up."""
    return sys._getframe(frame).f_code.co_name
