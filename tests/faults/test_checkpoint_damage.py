# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that are not what was written: never loaded, always named, and the newest good one takes their place."""
import errno
import os
import random
import resource
import shutil

import pytest
import torch
import torch.distributed as dist

from deepspeed.checkpoint import Checkpoint, CheckpointError
from deepspeed.checkpoint.filling import Filling
from deepspeed.checkpoint.source import DamageError
from tests.parity.everything import assert_same, config, everything, rows, start, state, train
from tests.parity.launch import on_ranks, run


def flip(path, at, bit=0):
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1 << bit]))


def cut(path, keep):
    with open(path, "r+b") as file:
        file.truncate(keep)


def two_saves(folder):
    engine = start(config(2))
    train(engine, 1)
    engine.save_checkpoint(folder)
    older = state(engine)
    train(engine, 1, 1)
    engine.save_checkpoint(folder)
    engine.destroy()
    return older


def damage(kind, newest):
    data = [os.path.join(newest, name) for name in sorted(os.listdir(newest)) if name.startswith("state")]
    if kind == "flip":
        flip(data[1], os.path.getsize(data[1]) - 5)
    elif kind == "flip in a header":
        flip(data[0], 20)
    elif kind == "truncated":
        cut(data[0], os.path.getsize(data[0]) - 1)
    elif kind == "longer":
        with open(data[0], "ab") as file:
            file.write(b"\0")
    elif kind == "missing":
        os.unlink(data[1])
    elif kind == "manifest":
        flip(os.path.join(newest, "manifest.json"), 200)
    elif kind == "torn manifest":
        cut(os.path.join(newest, "manifest.json"), 1000)
    elif kind == "no manifest":
        os.unlink(os.path.join(newest, "manifest.json"))
    else:
        shutil.rmtree(newest)


KINDS = ("flip", "flip in a header", "truncated", "longer", "missing", "manifest", "torn manifest", "no manifest", "gone")


def all_kinds(folder):
    good = os.path.join(folder, "good")
    older = two_saves(good)
    engine = start(config(3), everything(seed=5))
    for kind in KINDS:
        bad = os.path.join(folder, kind)
        if dist.get_rank() == 0:
            shutil.copytree(good, bad)
            damage(kind, os.path.join(bad, "global_step2"))
        dist.barrier()
        with pytest.raises(CheckpointError) as error:
            engine.load_checkpoint(bad, tag="global_step2")
        assert "global_step2" in str(error.value), kind
        path, _ = engine.load_checkpoint(bad)
        assert path.endswith("global_step1"), kind
        assert_same(state(engine), older)
    engine.destroy()


def test_the_last_good_one_loads_instead(tmp_path):
    run(all_kinds, 2, str(tmp_path))


@on_ranks(2)
def test_when_none_is_good_every_reason_is_given(tmp_path):
    two_saves(tmp_path)
    if dist.get_rank() == 0:
        for name in ("global_step1", "global_step2"):
            cut(tmp_path / name / "state_00000_of_00002.safetensors", 100)
    dist.barrier()
    engine = start(config(3), everything(seed=5))
    with pytest.raises(CheckpointError, match="(?s)no checkpoint could be loaded.*global_step2.*has 100 bytes.*global_step1.*has 100 bytes"):
        engine.load_checkpoint(tmp_path)
    engine.destroy()


def no_memory(filling):
    raise MemoryError("none is left")


@on_ranks(2)
def test_only_damage_leads_to_an_older_checkpoint(tmp_path):
    two_saves(tmp_path)
    other = everything(seed=5)
    other.more = torch.nn.Parameter(torch.zeros(3))
    engine = start(config(1), other)
    with pytest.raises(CheckpointError, match="(?s)global_step2.*parameter 'more' is not in the checkpoint"):
        engine.load_checkpoint(tmp_path)
    engine.destroy()
    engine = start(config(1), everything(seed=5))
    run_it = Filling.run
    try:
        if dist.get_rank() == 1:
            Filling.run = no_memory
        with pytest.raises(CheckpointError, match="global_step2 failed on rank 1: MemoryError: none is left"):
            engine.load_checkpoint(tmp_path)
        if dist.get_rank() == 0:
            cut(tmp_path / "global_step2" / "state_00000_of_00002.safetensors", 100)
        dist.barrier()
    finally:
        Filling.run = run_it
    assert engine.load_checkpoint(tmp_path)[0] == str(tmp_path / "global_step1")
    engine.destroy()


class Narrowed:
    """Reading a checkpoint's data as this process finds it with no more open files, or as another user."""

    def __init__(self, way):
        self.way, self.fill = way, Filling.run

    def __enter__(self):
        narrow = getattr(self, self.way)
        Filling.run = lambda filling: narrow(filling)

    def __exit__(self, *exc):
        Filling.run = self.fill

    def files(self, filling):
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
        try:
            self.fill(filling)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)

    def rights(self, filling):
        os.seteuid(65534)
        try:
            self.fill(filling)
        finally:
            os.seteuid(0)


@on_ranks(1)
@pytest.mark.parametrize("way, code", [("files", errno.EMFILE), ("rights", errno.EACCES)])
def test_what_the_system_refuses_is_no_damage(tmp_path, way, code):
    if way == "rights" and os.geteuid() != 0:
        pytest.skip("only root can become another user")
    older, newer = two_saves(tmp_path), str(tmp_path / "global_step2")
    data = os.path.join(newer, "state_00000_of_00001.safetensors")
    os.chmod(data, 0o600)
    engine = start(config(1), everything(seed=5))
    with Narrowed(way), pytest.raises(CheckpointError) as error:
        engine.load_checkpoint(tmp_path)
    assert not isinstance(error.value, DamageError)
    assert newer in str(error.value) and "_00000_of_00001.safetensors" in str(error.value) and f"errno {code}" in str(error.value).lower() and "global_step1" not in str(error.value)
    assert engine.load_checkpoint(tmp_path)[0] == newer
    flip(data, os.path.getsize(data) - 5)
    assert engine.load_checkpoint(tmp_path)[0] == str(tmp_path / "global_step1")
    assert_same(state(engine), older)
    engine.destroy()


@on_ranks(1)
def test_a_pointer_that_cannot_be_read_is_not_taken_for_none(tmp_path):
    two_saves(tmp_path)
    os.unlink(tmp_path / "latest")
    os.symlink("latest", tmp_path / "latest")   # ELOOP
    engine = start(config(1), everything(seed=5))
    with pytest.raises(CheckpointError, match="(?s)latest.*symbolic links|symbolic links.*latest"):
        engine.load_checkpoint(tmp_path)
    engine.destroy()


def one_step(engine, width):
    loss = engine(rows(0, dist.get_rank(), dist.get_world_size(), width))
    engine.backward(loss)
    engine.step()


@on_ranks(2)
def test_a_load_that_fails_midway_leaves_an_engine_that_refuses(tmp_path):
    width = 500   # files of several blocks: what is read before anything changes is whole
    engine = start(config(2), everything(width=width))
    one_step(engine, width)
    for folder in ("bad", "good"):
        engine.save_checkpoint(tmp_path / folder)
    older = state(engine)
    engine.destroy()
    if dist.get_rank() == 0:
        flip(tmp_path / "bad" / "global_step1" / "state_00001_of_00002.safetensors", 5000)
    dist.barrier()
    engine = start(config(2), everything(seed=5, width=width))
    for tag in (None, "global_step1"):
        with pytest.raises(CheckpointError, match="(?s)is damaged.*before and after.*load_checkpoint.*built anew"):
            engine.load_checkpoint(tmp_path / "bad", tag)
        for work in (lambda: one_step(engine, width), engine.step, lambda: engine.save_checkpoint(tmp_path / "c"),
                     lambda: engine.save_16bit_model(tmp_path / "c"), lambda: next(engine.iter_full_params()), engine.module_state_dict,
                     lambda: engine.module(rows(0, dist.get_rank(), dist.get_world_size(), width))):
            with pytest.raises(RuntimeError, match="loading .*bad.* has failed midway"):
                work()
    assert not (tmp_path / "c").exists()
    with pytest.raises(CheckpointError, match="before and after"):
        engine.load_checkpoint(tmp_path / "good", "no_such")
    engine.load_checkpoint(tmp_path / "good")
    assert_same(state(engine), older)
    one_step(engine, width)
    engine.destroy()


def test_every_flipped_bit_of_a_manifest_is_seen(tmp_path):
    run(two_saves, 2, str(tmp_path))
    where = tmp_path / "global_step2" / "manifest.json"
    text, draw = where.read_bytes(), random.Random(4)
    for _ in range(300):
        at, bit = draw.randrange(len(text)), draw.randrange(8)
        where.write_bytes(text[:at] + bytes([text[at] ^ 1 << bit]) + text[at + 1:])
        with pytest.raises(CheckpointError):
            Checkpoint(tmp_path / "global_step2")
    for _ in range(50):
        where.write_bytes(text[:draw.randrange(len(text))])
        with pytest.raises(CheckpointError):
            Checkpoint(tmp_path / "global_step2")
    where.write_bytes(text)
    assert Checkpoint(tmp_path / "global_step2").verify() == []


def test_every_flipped_bit_of_the_data_is_seen(tmp_path):
    run(two_saves, 2, str(tmp_path))
    folder, draw = tmp_path / "global_step2", random.Random(5)
    for name in sorted(os.listdir(folder)):
        if name.endswith(".safetensors"):
            for _ in range(20):
                at, bit = draw.randrange(os.path.getsize(folder / name)), draw.randrange(8)
                flip(folder / name, at, bit)
                assert len(Checkpoint(folder).verify()) == 1
                flip(folder / name, at, bit)
    assert Checkpoint(folder).verify() == []
