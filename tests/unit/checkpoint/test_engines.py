# SPDX-License-Identifier: Apache-2.0
"""The objects that save and load single files."""
import pickle

import pytest
import torch

from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointCommitInfo, CheckpointEngine


def test_a_file_comes_back(tmp_path):
    engine, info = TorchCheckpointEngine(), CheckpointCommitInfo("step1", str(tmp_path), True)
    assert isinstance(engine, CheckpointEngine) and not engine.is_decoupled() and engine.is_data_parallel_writer(0) and not engine.is_data_parallel_writer(1)
    engine.create(info)
    engine.makedirs(str(tmp_path / "a" / "b"))
    engine.save({"w": torch.ones(3)}, str(tmp_path / "a" / "b" / "x.pt"))
    assert engine.commit(info) and torch.equal(engine.load(str(tmp_path / "a" / "b" / "x.pt"))["w"], torch.ones(3))


def test_a_failed_save_leaves_nothing(tmp_path):
    with pytest.raises((pickle.PicklingError, AttributeError)):
        TorchCheckpointEngine().save({"f": lambda: 0}, str(tmp_path / "x.pt"))
    assert list(tmp_path.iterdir()) == []
