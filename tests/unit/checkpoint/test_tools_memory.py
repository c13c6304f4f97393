# SPDX-License-Identifier: Apache-2.0
"""Conversions hold chunks of tensors, not tensors: measured in a process of their own."""
import subprocess
import sys
from collections import OrderedDict

import pytest
import torch

_NUMEL = 24 << 20      # 96 MiB a tensor, twice
_BUDGET_MIB = 80       # four chunks of 16 MiB on their way, and the allocator's slack

_SCRIPT = """
import resource, sys
sys.path.insert(0, {root!r})
from deepspeed.checkpoint import command, ds_to_universal
from deepspeed.checkpoint.foreign import adapter, universal
from deepspeed.checkpoint.export import shards, universal
import torch, tqdm
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before = peak()
for arguments in {commands!r}:
    assert command.main(arguments) == 0
    print("GREW", peak() - before, arguments)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A checkpoint in the form of DeepSpeed's stage 0, of 192 MiB."""
    folder = tmp_path_factory.mktemp("large")
    (folder / "tag").mkdir()
    (folder / "latest").write_text("tag")
    module = OrderedDict((name, torch.full((_NUMEL,), value)) for name, value in (("a", 1.5), ("b", -2.5)))
    torch.save({"module": module, "buffer_names": [], "optimizer": None, "param_shapes": None, "global_steps": 1, "dp_world_size": 1, "mp_world_size": 1},
               folder / "tag" / "mp_rank_00_model_states.pt")
    return folder


def test_memory_does_not_grow_with_the_model(large, tmp_path):
    from deepspeed.checkpoint import command
    large, out = str(large), str(tmp_path / "out")
    commands = [["verify", large], ["diff", large, large], ["convert", large, out], ["convert", large, out, "--dtype", "bf16"],
                ["convert", large, out, "--to", "torch"], ["convert", large, out + "/tag", "--to", "universal"]]
    root = command.__file__.rpartition("/deepspeed/checkpoint/")[0]
    done = subprocess.run([sys.executable, "-c", _SCRIPT.format(root=root, commands=commands)], check=True, stdout=subprocess.PIPE, text=True)
    grew = [line for line in done.stdout.splitlines() if line.startswith("GREW")]
    assert len(grew) == len(commands) and all(float(line.split()[1]) < _BUDGET_MIB for line in grew), "\n".join(grew)
