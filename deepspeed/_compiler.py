# SPDX-License-Identifier: Apache-2.0
"""torch.compile, as decorators callers know."""
import torch
from torch.compiler import is_compiling  # noqa: F401

from deepspeed._torch_version import required_torch_version


def is_compile_supported():
    return True


def disable(func):
    """Decorator: torch.compile leaves this function alone."""
    return torch.compiler.disable(func)


def enable(min_version=None):
    """Decorator factory: torch.compile may trace the function from torch `min_version` on, and leaves it alone before."""

    def decorate(func):
        return func if min_version is None or required_torch_version(min_version=min_version) else disable(func)

    return decorate
