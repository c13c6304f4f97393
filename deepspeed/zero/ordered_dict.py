# SPDX-License-Identifier: Apache-2.0
"""A name older callers look for. Parameters used outside their module are found by their guard instead (guard.py)."""
from collections import OrderedDict


class ZeROOrderedDict(OrderedDict):
    """A module's parameters; nothing but a dict here."""

    def __init__(self, parent_module=None, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._parent_module = parent_module
        self._in_forward = False
