# SPDX-License-Identifier: Apache-2.0
"""The example's model and text. That it trains is the quick start's own business."""

import importlib.util
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

FOLDER = Path(__file__).resolve().parents[3] / "examples" / "gpt"


def load(name):
    """A file of the example as a module; its name is too common to be found by import."""
    spec = importlib.util.spec_from_file_location(f"example_gpt_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


data, model = load("data"), load("model")


def small():
    torch.manual_seed(0)
    return model.GPT(model.GPTConfig(layers=2, heads=2, width=32))


def test_default_size():
    numel = sum(parameter.numel() for parameter in model.GPT(model.GPTConfig()).parameters())
    assert 9e6 < numel < 11e6


def test_no_byte_sees_what_comes_after_it():
    gpt, tokens = small(), torch.randint(256, (1, 12))
    before = gpt(tokens)
    tokens[0, 7] = (tokens[0, 7] + 1) % 256
    after = gpt(tokens)
    assert torch.equal(before[0, :7], after[0, :7]) and not torch.equal(before[0, 7], after[0, 7])


def test_attention_depends_on_distances_only():
    """A query and a key three places apart give the same score wherever they are."""
    cos, sin = model.rotations(20, 8, "cpu")
    q, k = torch.randn(8 * 2), torch.randn(8 * 2)
    dots = [torch.dot(model.rotate(q, cos[i + 3], sin[i + 3]), model.rotate(k, cos[i], sin[i])) for i in (0, 5, 16)]
    torch.testing.assert_close(torch.stack(dots), dots[0].expand(3), rtol=1e-4, atol=1e-5)


def test_first_loss_is_that_of_a_guess_and_it_learns_one_batch():
    gpt, tokens = small(), torch.randint(256, (4, 16))
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    first = gpt(inputs, targets)
    assert first.item() == pytest.approx(math.log(256), abs=0.1)
    optimizer = torch.optim.AdamW(gpt.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        gpt(inputs, targets).backward()
        optimizer.step()
    assert gpt(inputs, targets).item() < 1


def test_text_is_split_by_file_and_the_same_every_time(tmp_path):
    parts = [data.text(part, tmp_path) for part in ("train", "validation")]
    assert len(parts[0]) > 10 * len(parts[1]) > 1e5
    again = data.text("validation", tmp_path / "again")
    assert np.array_equal(parts[1], again)
    files = data.source_files()
    assert sum(map(data.is_validation, files)) > 3 and not any("test" in path.parts for path in files)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == sorted(
        f"{part}-{data.sysconfig.get_python_version()}.bin" for part in ("train", "validation"))


def test_unigram_entropy():
    assert data.unigram_entropy(np.array([1, 2, 3, 4] * 5, dtype=np.uint8)) == 2.0
    assert 4 < data.unigram_entropy(data.text("validation")) < 5.5


def test_windows():
    windows = data.Windows(np.arange(23, dtype=np.uint8), 5)
    assert len(windows) == 4
    tokens, targets = windows[3]
    assert tokens.tolist() == [15, 16, 17, 18, 19] and targets.tolist() == [16, 17, 18, 19, 20]
    assert tokens.dtype == torch.int64
