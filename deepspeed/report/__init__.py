# SPDX-License-Identifier: Apache-2.0
"""What this machine and this installation can do: `ds_report`, `python -m deepspeed.report`. Imports no torch by itself."""
from deepspeed._lazy import attach, names

__getattr__, __dir__, __all__ = attach(__name__, {
    **names("deepspeed.report.command", "main", "cli_main", "collect"),
    **names("deepspeed.report.facts", "Fact"),
})
