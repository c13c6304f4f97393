# SPDX-License-Identifier: Apache-2.0
"""Import path of the report that callers know; `python -m deepspeed.env_report` too."""
from deepspeed.report.command import cli_main, main  # noqa: F401

if __name__ == "__main__":
    cli_main()
