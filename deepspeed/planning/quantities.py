# SPDX-License-Identifier: Apache-2.0
"""Numbers as people write them: 7e9, 7B, 350M; 80GB, 512MiB."""
import re

GIB = 2**30
_COUNTS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9, "t": 10**12}
_BYTES = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
_NUMBER = r"\s*([0-9]*\.?[0-9]+(?:[eE][+]?[0-9]+)?)\s*"


def count(text):
    """"7e9", "7B" and "7000000000" are 7000000000."""
    return _read(text, _COUNTS, r"([kmbgt]?)\s*", "a number such as 7e9, 7B or 350M")


def size_bytes(text):
    """"80GB" and "80GiB" are both 80 * 2**30, as makers of GPUs count.
    A number alone is bytes, and below 1 MiB it is refused: nobody has a GPU of 80 bytes."""
    value = _read(text, _BYTES, r"([kmgt]?)(?:i?b)?\s*", "a size such as 80GB or 512MB")
    if value < _BYTES["m"] and re.fullmatch(_NUMBER, str(text)):
        raise ValueError(f"{str(text).strip()!r} has no unit and would be bytes: say {str(text).strip()}GB or {str(text).strip()}MB")
    return value


def _read(text, factors, suffix, expected):
    match = re.fullmatch(_NUMBER + suffix, str(text), re.IGNORECASE)
    value = float(match[1]) * factors[match[2].lower()] if match else 0
    if not match or not 1 <= value < 2**62:
        raise ValueError(f"{text!r} is not {expected}")
    return int(round(value))


def gib(number):
    """Bytes as GiB with three digits that mean something."""
    value = number / GIB
    return "–" if number == 0 else f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
