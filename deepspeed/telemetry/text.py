# SPDX-License-Identifier: Apache-2.0
"""Values as text."""


def call_to_str(base, *args, **kwargs):
    """call_to_str("f", 1, x=2) is "f(1, x=2)"."""
    arguments = [repr(value) for value in args] + [f"{key}={value!r}" for key, value in kwargs.items()]
    return f"{base}({', '.join(arguments)})"
