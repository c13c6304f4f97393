# SPDX-License-Identifier: Apache-2.0
"""The version of this library, in one place."""

__version__ = "1.0.0"
MAJOR, MINOR, PATCH = (int(part) for part in __version__.split("."))
