# SPDX-License-Identifier: Apache-2.0
"""The ``deepspeed`` command."""

from __future__ import annotations

import os
import sys

from .exports import DEEPSPEED_ENVIRONMENT_NAME, DEEPSPEED_ENVIRONMENT_PATHS, EXPORT_ENVS, environment_files
from .options import parse_args
from .resources import (encode_world_info, fetch_hostfile, parse_hostfile, parse_inclusion_exclusion,
                        parse_resource_filter)

__all__ = [
    "DEEPSPEED_ENVIRONMENT_NAME", "DEEPSPEED_ENVIRONMENT_PATHS", "EXPORT_ENVS", "encode_world_info", "fetch_hostfile",
    "main", "parse_args", "parse_hostfile", "parse_inclusion_exclusion", "parse_resource_filter"
]

def main(args: list[str] | None = None) -> None:
    """Entry point of the command; ends with the exit code of the job."""
    words = sys.argv[1:] if args is None else args
    if words[:1] == ["plan"]:  # the one word that is no script; a script of that name is started as ./plan
        from deepspeed.planning.command import main as plan
        plan(words[1:])
    parsed = parse_args(args)
    # Only now, so that --help need not load them.
    from .launch import LaunchError, launch
    from .placement import plan_job, starts_hosts
    from .say import Voice
    say = Voice(parsed.log_level)
    try:
        job = plan_job(parsed, say)
        if starts_hosts(parsed, job.world_info):
            from .head import run_on_hosts
            code = run_on_hosts(job, parsed, say)
        else:
            if len(job.world_info) > 1:
                os.environ.update(environment_files())
            code = launch(job, say)
    except (LaunchError, OSError, ValueError) as error:
        say("critical", f"error: {error}")
        code = 1
    sys.exit(code)


if __name__ == "__main__":
    main()
