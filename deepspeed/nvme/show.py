# SPDX-License-Identifier: Apache-2.0
"""Sizes as people write them, tables and progress bars."""
import contextlib
import re

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def parse_size(text):
    """'400M' -> bytes; the units are powers of 1024."""
    match = re.fullmatch(r"(\d+)([KMGT]?)I?B?", str(text).strip().upper())
    if match is None or int(match[1]) == 0:
        raise ValueError(f"not a size: {text!r} (a positive number, with K, M, G or T behind it if you like)")
    return int(match[1]) * _UNITS[match[2]]


def size(number):
    for unit in ("T", "G", "M", "K"):
        if number >= _UNITS[unit] and number % _UNITS[unit] == 0:
            return f"{number // _UNITS[unit]}{unit}"
    return str(number)


def table(head, rows):
    """Columns as wide as their widest cell; the first to the left, the others to the right."""
    cells = [head, *[[str(cell) for cell in row] for row in rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    lines = ["  ".join([row[0].ljust(widths[0]), *[cell.rjust(width) for cell, width in zip(row[1:], widths[1:])]]).rstrip() for row in cells]
    return "\n".join([lines[0], "-" * (sum(widths) + 2 * len(widths) - 2), *lines[1:]])


@contextlib.contextmanager
def bar(total, what):
    """A function to call after each step; draws on a terminal only."""
    from tqdm import tqdm
    with tqdm(total=total, desc=what, unit="loop", disable=None, leave=False) as drawn:
        yield lambda: drawn.update()
