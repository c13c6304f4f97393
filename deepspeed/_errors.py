# SPDX-License-Identifier: Apache-2.0
"""Exceptions callers catch by name."""


class DeprecatedException(Exception):
    """Something that used to exist was asked for."""


class ZeRORuntimeException(Exception):
    """A combination of settings that ZeRO cannot run."""
