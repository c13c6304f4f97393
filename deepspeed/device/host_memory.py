# SPDX-License-Identifier: Apache-2.0
"""Giving freed host memory back to the system."""
import ctypes
import functools
import os

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_SMALL_BYTES = 128 << 10            # where glibc starts
_LARGE_BYTES = 32 << 20             # where glibc ends once blocks of that size have been freed


@functools.lru_cache(maxsize=None)
def _function(name):
    try:
        return getattr(ctypes.CDLL(None), name)
    except (OSError, AttributeError):  # another C library than glibc
        return None


def trim_heap():
    """Returns what malloc keeps of freed blocks. Weights that were moved elsewhere leave hundreds of MB behind otherwise."""
    function = _function("malloc_trim")
    if function is not None:
        function(0)


def blocks_from_system(on):
    """While on, malloc takes every block above 128 KiB from the system and gives it back when freed; afterwards blocks up to 32 MiB
    come from its heap, as glibc arrives at by itself.

    For the time in which a model is built and its parameters move away: they would leave a heap as large as the model and full of
    holes, over which the activations of every later step scatter. Does nothing where the user has tuned malloc.
    """
    if "MALLOC_MMAP_THRESHOLD_" in os.environ or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return
    function = _function("mallopt")
    if function is not None:
        size = _SMALL_BYTES if on else _LARGE_BYTES
        function(_M_MMAP_THRESHOLD, size)
        function(_M_TRIM_THRESHOLD, 2 * size)
