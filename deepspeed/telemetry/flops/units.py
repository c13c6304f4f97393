# SPDX-License-Identifier: Apache-2.0
"""Large and small numbers for people: 1234.5 is "1.23 K"."""

_FACTORS = {"T": 1e12, "G": 1e9, "B": 1e9, "M": 1e6, "K": 1e3, "": 1.0, "m": 1e-3, "u": 1e-6}


def _scaled(number, units, precision):
    """(digits, prefix); `units` is one of the prefixes above, or None for the largest that leaves at least 1."""
    if units is None:
        size = abs(number)
        units = "" if size == 0 else next((u for u in ("T", "G", "M", "K", "", "m") if size >= _FACTORS[u]), "u")
    if units not in _FACTORS:
        raise ValueError(f"unit prefix {units!r} is unknown; one of {', '.join(repr(u) for u in _FACTORS)} is")
    digits = f"{number / _FACTORS[units]:.{precision}f}"
    return digits.rstrip("0").rstrip(".") if "." in digits else digits, units


def number_to_string(num, units=None, precision=2):
    digits, prefix = _scaled(num, units, precision)
    return f"{digits} {prefix}"


def macs_to_string(macs, units=None, precision=2):
    return number_to_string(macs, units, precision) + "MACs"


def flops_to_string(flops, units=None, precision=2):
    """Of a rate: operations per second."""
    return number_to_string(flops, units, precision) + "FLOPS"


def bytes_to_string(b, units=None, precision=2):
    return number_to_string(b, units, precision) + "B"


def duration_to_string(duration, units=None, precision=2):
    """duration: seconds. Without `units` never more than seconds: 1234.5 is "1234.5 s"."""
    return number_to_string(duration, "" if units is None and duration >= 1 else units, precision) + "s"


def params_to_string(params_num, units=None, precision=2):
    digits, prefix = _scaled(params_num, units, precision)
    return f"{digits} {'B' if prefix == 'G' else prefix}".rstrip()
