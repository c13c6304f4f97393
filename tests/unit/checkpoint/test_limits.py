# SPDX-License-Identifier: Apache-2.0
"""What the system refuses while a checkpoint is read says nothing about the checkpoint: an error that names file and reason, no damage."""
import subprocess
import sys

import pytest
import torch

from tests.unit.checkpoint.test_folders import put

_SCRIPT = """
import errno, resource, sys
import torch
from deepspeed._native import core
from deepspeed.checkpoint import Checkpoint, CheckpointError
from deepspeed.checkpoint.source import DamageError
found = Checkpoint({folder!r})
core().io_engine_name()   # its threads run
limit = resource.{limit}
value = {value}
resource.setrlimit(limit, (value, resource.getrlimit(limit)[1]))
try:
    found.read("w0", "fp32")
except CheckpointError as error:
    print("DAMAGE" if isinstance(error, DamageError) else "ERROR", error)
"""
_MEMORY = 'int(next(line for line in open("/proc/self/status") if line.startswith("VmSize")).split()[1]) * 1024'


@pytest.mark.parametrize("limit, value, code", [("RLIMIT_NOFILE", "0", "errno 24"), ("RLIMIT_AS", _MEMORY, "errno 12")], ids=["files", "memory"])
def test_no_damage(tmp_path, limit, value, code):
    put(tmp_path, "t")
    script = _SCRIPT.format(folder=str(tmp_path / "t"), limit=limit, value=value)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.startswith("ERROR") and "state_00000_of_00001.safetensors" in done.stdout and code in done.stdout, done.stdout + done.stderr


def test_a_file_that_ends_too_early_while_it_is_read_is_damage(tmp_path):
    from deepspeed.checkpoint import Checkpoint
    from deepspeed.checkpoint.source import DamageError
    put(tmp_path, "t")
    found = Checkpoint(tmp_path / "t")
    assert torch.equal(found.read("w0", "fp32"), torch.zeros(4))
    path = tmp_path / "t" / "state_00000_of_00001.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DamageError, match="state_00000_of_00001.safetensors"):
        found.read("w0", "fp32")
