# SPDX-License-Identifier: Apache-2.0
"""Reaching into a tree of modules by a dotted path."""
from functools import reduce


def recursive_getattr(model, module_name):
    """`model.a.b` for "a.b"; a number picks from a list of modules."""
    return reduce(_step, module_name.split("."), model)


def recursive_setattr(model, module_name, module):
    """Puts `module` at the dotted path."""
    parent, _, name = module_name.rpartition(".")
    setattr(recursive_getattr(model, parent) if parent else model, name, module)


def _step(node, name):
    try:
        return getattr(node, name)
    except AttributeError:
        if name.isdigit() and hasattr(node, "__getitem__"):
            return node[int(name)]
        raise
