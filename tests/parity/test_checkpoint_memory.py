# SPDX-License-Identifier: Apache-2.0
"""Saving and loading hold at most a rank's shard, the largest tensor and 256 MB beside what the engine holds anyway: measured as the
growth of resident memory, with a state of which a copy would not fit into that.

Allowed here is less than that: a foreground save, a load and a resharding load copy no shard at all.
"""
import os
import shutil
import tempfile

import pytest
import torch
import torch.distributed as dist
from torch import nn

import deepspeed
from tests.parity.launch import run
from tests.parity.resident import growth

MIB = 1 << 20
ROWS, WIDTH, LAYERS = 2560, 2048, 10
LARGEST = 4 * ROWS * WIDTH                            # 20 MiB
WHOLE = 3 * LAYERS * LARGEST                          # 600 MiB: weights and two moments in fp32
STAGING = 96 * MIB                                    # blocks on their way, and the allocator's slack


class Tall(nn.Module):

    def __init__(self):
        super().__init__()
        self.weights = nn.ParameterList(nn.Parameter(torch.full((ROWS, WIDTH), float(number))) for number in range(LAYERS))


def start(stage, precision="fp32", background=False):
    cfg = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": stage}, "gradient_clipping": 1.0,
           "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}, "checkpoint": {"writer": {"decoupled": background}}}
    if precision != "fp32":
        cfg[precision] = {"enabled": True}
    engine = deepspeed.initialize(model=Tall(), config=cfg)[0]
    stepper = engine.optimizer.stepper
    stepper.ensure_state()   # as the first update would
    for number in range(len(engine.optimizer.slices)):
        for state in stepper.memory_of(number):
            state.zero_()    # takes the memory that is set aside
    stepper.steps = 1
    return engine


def worst(grown):
    """Of all ranks."""
    found = torch.tensor([grown])
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return found.item()


def save_all_ways(folder):
    shard = WHOLE // dist.get_world_size()
    engine = start(2)
    foreground = worst(growth(lambda: engine.save_checkpoint(folder, tag="foreground")))
    load = worst(growth(lambda: engine.load_checkpoint(folder, tag="foreground")))
    engine.destroy()
    del engine
    engine = start(2, background=True)
    held = engine._background_saver.snapshot

    def in_background():
        engine.save_checkpoint(folder, tag="background")
        engine._finish_save()

    held._making.join()
    before = held.bytes()   # is there since the engine was made, and counts
    background = worst(growth(in_background) + before)
    engine.destroy()
    assert foreground < LARGEST + STAGING and load < LARGEST + STAGING, (foreground / MIB, load / MIB)
    assert shard // 2 < background < shard + LARGEST + STAGING < WHOLE, background / MIB


def load_elsewhere(folder, stage, precision):
    engine = start(stage, precision)
    grown = worst(growth(lambda: engine.load_checkpoint(folder, tag="foreground")))
    assert grown < LARGEST + STAGING, grown / MIB
    with deepspeed.zero.GatheredParameters(list(engine.module.weights)):
        for number, weight in enumerate(engine.module.weights):
            assert bool((weight == number).all())
    engine.destroy()


@pytest.fixture
def folder(tmp_path):
    """In memory where there is room: how fast the disk is does not matter here."""
    shared = "/dev/shm"
    if not os.path.isdir(shared) or shutil.disk_usage(shared).free < 4 * WHOLE:
        yield str(tmp_path)
        return
    with tempfile.TemporaryDirectory(dir=shared, prefix="checkpoint_memory_") as folder:
        yield folder


def test_memory_of_saving_and_loading(folder):
    run(save_all_ways, 2, folder)
    run(load_elsewhere, 1, folder, 0, "fp32")
    run(load_elsewhere, 2, folder, 3, "bf16")
