# SPDX-License-Identifier: Apache-2.0
"""What a probe says."""
from typing import NamedTuple


class Fact(NamedTuple):
    """One line of the report. ok: True works, False does not, None neither (a plain fact). Every False has advice: what to do."""
    name: str
    value: object
    ok: object = None
    advice: str = ""


def yes(name, value):
    return Fact(name, value, True)


def no(name, value, advice):
    if not advice:
        raise ValueError(f"fact {name!r}: what does not work needs advice: say what to do")
    return Fact(name, value, False, advice)


def size(number_bytes):
    """Bytes for people."""
    for unit, factor in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if number_bytes >= factor:
            return f"{number_bytes / factor:.1f} {unit}"
    return f"{number_bytes} bytes"


def read_text(path, default=""):
    """A small file of /proc or /sys; `default` where it does not exist or may not be read."""
    try:
        with open(path) as file:
            return file.read().strip()
    except (OSError, UnicodeDecodeError):
        return default
