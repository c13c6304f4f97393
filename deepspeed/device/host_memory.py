# SPDX-License-Identifier: Apache-2.0
"""Giving freed host memory back to the system."""
import ctypes
import functools


@functools.lru_cache(maxsize=None)
def _malloc_trim():
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):  # another C library than glibc
        return None


def trim_heap():
    """Returns what malloc keeps of freed blocks. Weights that were moved elsewhere leave hundreds of MB behind otherwise."""
    function = _malloc_trim()
    if function is not None:
        function(0)
