# SPDX-License-Identifier: Apache-2.0
"""The environment that goes from the launching host to the ranks of the others, and what does not reach a rank."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

# File with KEY=VALUE lines for the ranks of other hosts, and where it is looked for.
DEEPSPEED_ENVIRONMENT_NAME = os.environ.get("DS_ENV_FILE") or ".deepspeed_env"
DEEPSPEED_ENVIRONMENT_PATHS = [os.path.expanduser("~"), "."]
# Variables of this shell that ranks on other hosts get as well, by their beginnings.
EXPORT_ENVS = ["MLFLOW", "PYTHON", "MV2", "UCX", "NCCL", "GLOO", "DS_", "DEEPSPEED_"]

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# What tells a rank that MPI started it. It did not (see above), and a script that imports mpi4py would wait for a world.
MPI_VARIABLES = re.compile(r"(OMPI|PMIX?|PMI2|OPAL|ORTE|PRTE|HYDRA|HYDI|MPI|MPIR|MPIEXEC|MV2_COMM_WORLD)_.*|"
                           r"SLURM_(PROCID|LOCALID|STEP_.*|NTASKS)")


def read_environment_file(path: str) -> dict[str, str]:
    """``KEY=VALUE`` lines; empty ones and those with # in front are skipped. ``ValueError`` names a line that is wrong."""
    found = {}
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            text = line.strip()
            if not text or text.startswith("#"):
                continue
            key, equals, value = text.partition("=")
            key = key.removeprefix("export ").strip()
            if not equals or not _NAME.fullmatch(key):
                raise ValueError(f"{path} line {number}: expected KEY=VALUE, found {text!r}")
            found[key] = value.strip()
    return found


def environment_files() -> dict[str, str]:
    """All of .deepspeed_env: of the home directory, then of this one, which wins."""
    found: dict[str, str] = {}
    for folder in DEEPSPEED_ENVIRONMENT_PATHS:
        path = os.path.join(folder, DEEPSPEED_ENVIRONMENT_NAME)
        if os.path.isfile(path):
            try:
                found.update(read_environment_file(path))
            except OSError as error:
                raise ValueError(f"{path}: cannot be read: {error.strerror} (DS_ENV_FILE names another file)") from None
    return found


def exported(environ: Mapping[str, str]) -> dict[str, str]:
    """What a host's launcher gets from this shell and from .deepspeed_env."""
    found = {name: value for name, value in environ.items() if _NAME.fullmatch(name) and name.startswith(tuple(EXPORT_ENVS))}
    return {**found, **environment_files()}
