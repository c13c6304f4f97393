# SPDX-License-Identifier: Apache-2.0
"""Values that must agree."""


def get_only_unique_item(items):
    """The value that all items share; RuntimeError when they differ or there are none."""
    distinct = set(items)
    if len(distinct) != 1:
        raise RuntimeError(f"expected one value, got {len(distinct)}: {distinct}")
    return distinct.pop()
