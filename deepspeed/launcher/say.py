# SPDX-License-Identifier: Apache-2.0
"""The launcher's own few words. Not the library's logger: that one belongs to the ranks."""

import sys

LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40, "critical": 50}


class Voice:
    """Writes ``[deepspeed] ...`` lines to stderr from the chosen level up."""

    def __init__(self, level: str = "info") -> None:
        self.threshold = LEVELS[level]

    def __call__(self, level: str, message: str) -> None:
        if LEVELS[level] >= self.threshold:
            try:
                sys.stderr.write(f"[deepspeed] {message}\n")
                sys.stderr.flush()
            except OSError:
                pass  # nobody reads stderr any more; the job itself goes on
