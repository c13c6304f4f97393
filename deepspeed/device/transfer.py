# SPDX-License-Identifier: Apache-2.0
"""Moving nested containers of tensors to a device."""


def _map_tensors(item, visit):
    if isinstance(item, tuple) and hasattr(item, "_fields"):
        return type(item)(*(_map_tensors(value, visit) for value in item))
    if isinstance(item, (list, tuple)):
        return type(item)(_map_tensors(value, visit) for value in item)
    if isinstance(item, dict):
        return type(item)({key: _map_tensors(value, visit) for key, value in item.items()})
    return visit(item)


def move_to_device(item, device, criterion_func=None):
    """`item` with every leaf that has `.to` on `device`; leaves for which `criterion_func` is false stay as they are."""

    def visit(leaf):
        wanted = hasattr(leaf, "to") if criterion_func is None else criterion_func(leaf)
        return leaf.to(device) if wanted else leaf

    return _map_tensors(item, visit)


def copy_to_device(item, device, criterion_func):
    """Like `move_to_device`, but what moves is a copy even if it is on `device` already."""

    def visit(leaf):
        if not criterion_func(leaf):
            return leaf
        moved = leaf.to(device)
        return leaf.clone() if moved is leaf else moved

    return _map_tensors(item, visit)
