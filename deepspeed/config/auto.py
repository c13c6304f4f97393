# SPDX-License-Identifier: Apache-2.0
"""Who fills in "auto": Hugging Face's Trainer and Accelerate do, before they call initialize(). Left in place it means "not given"."""

WHO_FILLS = "Hugging Face's Trainer and Accelerate put numbers there; a script without them has to write numbers in the configuration"


def hint(source, names):
    """A sentence for an error about top-level keys that are missing, when the configuration has them as "auto"; else nothing."""
    if not (hasattr(source, "keys") and hasattr(source, "items")):
        return ""
    left = [name for name in names if isinstance(source.get(name), str) and source[name] == "auto"]
    return f'. "auto" ({", ".join(left)}) counts as not given: {WHO_FILLS}' if left else ""
