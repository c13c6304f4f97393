# SPDX-License-Identifier: Apache-2.0
"""What higher rooms have lower ones call, by name: the only places where control goes up."""
import sys

from deepspeed._lazy import resolve

_ENTRIES = {
    # event: (what has to be imported for the entry to have anything to do, function without arguments)
    "zero.Init begins": [("transformers.modeling_utils", "deepspeed.checkpoint.transformers_loading:install")],
}


def call_entries(event):
    for needs, home in _ENTRIES[event]:
        if needs in sys.modules:
            resolve("deepspeed", home, home)()
