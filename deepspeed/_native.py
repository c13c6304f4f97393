# SPDX-License-Identifier: Apache-2.0
"""Loads the two compiled modules on demand and says clearly why when it cannot.

``core()`` gives ``deepspeed._core`` (config, plan, files; no torch needed); ``lib()`` gives ``deepspeed._C`` (collectives,
reducer, step; imports torch).
"""

import importlib
import os
import sys

_whole = {}   # modules whose import is over; sys.modules also has those that another thread is importing
_BUILD_HINT = "Build it with `pip install .` from the source tree, with the same Python that runs this script."


class NativeExtensionError(ImportError):
    """A compiled module is missing or does not fit this environment."""


def _extension_exists(name):
    """Whether some build of module ``name`` lies beside this file, for whichever Python."""
    here = os.path.dirname(os.path.abspath(__file__))
    return any(entry.startswith(name + ".") and entry.endswith((".so", ".pyd")) for entry in os.listdir(here))


def _load(name):
    try:
        module = _whole[name] = importlib.import_module("deepspeed." + name)
        return module
    except ModuleNotFoundError as error:
        if error.name != "deepspeed." + name:
            raise
        if _extension_exists(name):
            raise NativeExtensionError(
                f"deepspeed.{name} was built for another Python than {sys.version.split()[0]} ({sys.executable}). {_BUILD_HINT}"
            ) from error
        raise NativeExtensionError(
            f"The compiled module deepspeed.{name} is missing: the package was not built. {_BUILD_HINT}") from error


def core():
    """The compiled module that needs no torch."""
    return _whole.get("_core") or _load("_core")


def lib():
    """The compiled module that stands on torch; imports torch first."""
    module = _whole.get("_C")   # torch.compile follows this line, and could not follow an import
    if module is not None:
        return module
    try:
        import torch
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise NativeExtensionError(
            f"deepspeed needs PyTorch and {sys.executable} has none: install torch>=2.11, then build deepspeed again.") from error
    built = getattr(core(), "TORCH_VERSION", "unknown")
    # libtorch's C++ interface holds only within one minor version; across them a load may even succeed and crash later.
    fits = built.split("+")[0].split(".")[:2] == torch.__version__.split("+")[0].split(".")[:2]
    try:
        if fits:
            return _load("_C")
        reason = "another minor version"
    except NativeExtensionError:
        raise
    except ImportError as error:
        reason = str(error)
    raise NativeExtensionError(
        f"deepspeed was built against torch {built} and this is torch {torch.__version__} ({reason}). {_BUILD_HINT}")
