# SPDX-License-Identifier: Apache-2.0
"""The benchmark's own promises: it refuses wrong losses, its formula is the stated one, models are what their names say."""
import argparse
import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
import memory  # noqa: E402
import models  # noqa: E402
import running  # noqa: E402

TINY = ["--model", "gpt-2m", "--tokens", "8", "--batch", "1", "--steps", "1", "--checked", "2"]


@pytest.fixture
def settings():
    parser = argparse.ArgumentParser()
    running.add_arguments(parser, "ddp")
    return parser.parse_args(["--timeout", "150"])


def test_wrong_losses_are_not_timed(settings, tmp_path):
    path = Path(running.make_reference(settings, str(tmp_path), TINY[:6] + ["--checked", "2"]))
    ddp = running.Contender("ddp", 0, False)
    result = running.run(settings, ddp, "train_step.py", [*TINY, "--reference", str(path)])
    assert result["loss_error"] <= 1e-5 * 6 and result["steps"] == 1 and result["median_s"] > 0
    reference = json.loads(path.read_text())
    reference["losses"][1][0][1] += 1e-3
    reference["losses"][1][0][0] += 1e-3
    path.write_text(json.dumps(reference))
    with pytest.raises(running.Failed, match="not timed: ddp .* losses are off by 0.001"):
        running.run(settings, ddp, "train_step.py", [*TINY, "--reference", str(path)])


@pytest.mark.parametrize("name, low, high", [("gpt-25m", 25e6, 27e6), ("gpt-300m", 300e6, 310e6)])
def test_models_have_the_size_of_their_name(name, low, high):
    model = models.build(name)
    numel = sum(p.numel() for p in model.parameters())
    assert low <= numel <= high
    assert models.MODELS[name].unit_numel == sum(p.numel() for p in model.blocks[0].parameters())


def test_formula():
    assert memory.allowed_bytes(3, 1000, 10, 7, 2) == 8000 + 80 + 7
    assert memory.allowed_bytes(1, 1000, 10, 7, 2) == memory.allowed_bytes(2, 1000, 10, 7, 2) == 4000 + 6000 + 80 + 7


@pytest.mark.parametrize("text", ["ours", "ddp:1"])
def test_contenders_have_a_stage_or_none(text):
    with pytest.raises(argparse.ArgumentTypeError, match="write ours:STAGE"):
        running.Contender.parse(text)


def test_table():
    assert running.table(["a", "b"], [[1, 2]]) == "| a | b |\n|---|---|\n| 1 | 2 |"
