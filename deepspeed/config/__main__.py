# SPDX-License-Identifier: Apache-2.0
"""`python -m deepspeed.config [FILE]` writes the documentation of all keys to FILE (default docs/config.md); `-` prints it."""
import pathlib
import sys

from deepspeed.config import documentation


def main(arguments):
    target = arguments[0] if arguments else "docs/config.md"
    if target == "-":
        sys.stdout.write(documentation())
    else:
        pathlib.Path(target).write_text(documentation(), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
