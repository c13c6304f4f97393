# SPDX-License-Identifier: Apache-2.0
"""Saves in the background at the end of their process, and without the ranks that should answer."""
import subprocess
import sys
import time

import pytest
import torch.distributed as dist

from deepspeed.checkpoint import background, folders, manifest
from tests.parity.launch import on_ranks

_PROGRAM = '''
import sys, time, torch
from deepspeed.checkpoint import background, save
from deepspeed.checkpoint.pieces import Piece
from deepspeed.checkpoint.ranks import Ranks

def slow(path, pieces, leave, known=save.stream):
    time.sleep(1)
    if {fails}:
        raise OSError(28, "No space left on device", path)
    return known(path, pieces)

save.stream = slow

def main():
    saver = background.BackgroundSaver()
    piece = Piece("w", "weight", (3,), (), 0, torch.arange(3.0))
    saver.start(save.SaveRequest(sys.argv[1], "last", [piece], {{}}, None, {{}}), Ranks(), save.FrozenFile())

main()   # nothing holds the saver any more
print("through", flush=True)
'''


@pytest.mark.parametrize("fails", [False, True])
def test_a_save_that_outlives_its_engine_is_finished_or_loud(tmp_path, fails):
    done = subprocess.run([sys.executable, "-c", _PROGRAM.format(fails=fails), tmp_path], capture_output=True, text=True, timeout=120)
    assert "through" in done.stdout, done.stderr
    if fails:
        assert done.returncode == 1 and "the last checkpoint was not written" in done.stdout + done.stderr
        assert "No space left" in done.stdout + done.stderr and not (tmp_path / "last").exists()
    else:
        assert done.returncode == 0, done.stderr
        assert manifest.Checkpoint(tmp_path / "last").verify() == []
        assert folders.read_latest(tmp_path) == "last"


class _Two:
    """This process and one that was killed."""
    rank, size = 0, 2


@on_ranks(1)
def test_nobody_waits_for_ever_at_the_end(monkeypatch):
    board = background._Board(_Two(), "gone")
    monkeypatch.setattr(background, "_PATIENCE_S", 0.2)
    monkeypatch.setattr(background, "_ended_at", [time.monotonic()])
    began = time.monotonic()
    with pytest.raises(TimeoutError, match="wrote/1"):
        board.get("wrote/1")
    assert time.monotonic() - began < 10


@on_ranks(1)
def test_no_keys_are_left():
    board = background._Board(_Two(), "both")
    keys = ["wrote/0", "wrote/1", "outcome"]
    for key in keys:
        board.put(key, None)
    other = background._Board(_Two(), "both")
    other.goodbye(1)
    assert board.store.check([*keys, "read/1"])
    board.goodbye(0)
    assert not any(board.store.check([key]) for key in [*keys, "read/1"])
    assert dist.get_world_size() == 1
