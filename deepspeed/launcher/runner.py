# SPDX-License-Identifier: Apache-2.0
"""The ``deepspeed`` command."""

from __future__ import annotations

import os
import sys

from .options import parse_args
from .resources import (encode_world_info, fetch_hostfile, parse_hostfile, parse_inclusion_exclusion,
                        parse_resource_filter)

__all__ = [
    "DEEPSPEED_ENVIRONMENT_NAME", "DEEPSPEED_ENVIRONMENT_PATHS", "EXPORT_ENVS", "encode_world_info", "fetch_hostfile",
    "main", "parse_args", "parse_hostfile", "parse_inclusion_exclusion", "parse_resource_filter"
]

# File with KEY=VALUE lines for the ranks of other hosts, and where it is looked for.
DEEPSPEED_ENVIRONMENT_NAME = os.environ.get("DS_ENV_FILE") or ".deepspeed_env"
DEEPSPEED_ENVIRONMENT_PATHS = [os.path.expanduser("~"), "."]
# Variables of this shell that ranks on other hosts get as well, by their beginnings.
EXPORT_ENVS = ["MLFLOW", "PYTHON", "MV2", "UCX", "NCCL"]


def main(args: list[str] | None = None) -> None:
    """Entry point of the command; ends with the exit code of the job."""
    parsed = parse_args(args)
    # Only now, so that --help need not load them.
    from .launch import LaunchError, launch
    from .placement import plan_job
    from .say import Voice
    say = Voice(parsed.log_level)
    try:
        code = launch(plan_job(parsed, say), say)
    except (LaunchError, ValueError) as error:
        say("critical", f"error: {error}")
        code = 1
    sys.exit(code)


if __name__ == "__main__":
    main()
