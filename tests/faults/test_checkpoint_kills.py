# SPDX-License-Identifier: Apache-2.0
"""kill -9 at random moments of saving, on a disk that is full or not: a good checkpoint always loads, and it is one that was saved.

`python -m tests.faults.test_checkpoint_kills 200 [seed]` kills that often.
"""
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import time

import pytest
import torch

from tests.parity.launch import _context, _die_with_parent, run

RANKS = 2
NUMEL = 90_001
TAGS = (None, "same")


class Wide(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weights = torch.nn.ParameterList(torch.zeros(NUMEL) for _ in range(3))
        self.still = torch.nn.Parameter(torch.ones(1000), requires_grad=False)

    def forward(self, x):
        return sum((w * x).sum() for w in self.weights)


def engine_at(folder, decoupled=False):
    import deepspeed
    config = {"train_micro_batch_size_per_gpu": 1, "optimizer": {"type": "Adam", "params": {"lr": 0.0}}, "bf16": {"enabled": True},
              "zero_optimization": {"stage": 2}, "checkpoint": {"writer": {"decoupled": decoupled}, "keep_last": 2},
              "hang_detection": {"enabled": False}}
    return deepspeed.initialize(model=Wide(), config=config)[0]


def fill(engine, number):
    """Every element of the state says which save it belongs to."""
    for index, held in enumerate(engine.optimizer.slices):
        for value in (held.master, *engine.optimizer.stepper.native.states(index)):
            value.fill_(number)
    engine.global_steps = number


def save_for_ever(pipe, rank, port_file, folder, first, decoupled, seed):
    """One rank of a job that saves and saves; it sends the number of each save that is over."""
    from datetime import timedelta

    import torch.distributed as dist
    _die_with_parent()
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS), LOCAL_WORLD_SIZE=str(RANKS), OMP_NUM_THREADS="1")
    dist.init_process_group("gloo", store=dist.FileStore(port_file, RANKS), rank=rank, world_size=RANKS, timeout=timedelta(seconds=60))
    draw = random.Random(seed)
    engine = engine_at(folder, decoupled)
    engine.backward(engine(torch.ones(1, dtype=torch.bfloat16)))
    engine.step()
    number = first
    while True:
        number += 1
        fill(engine, number)
        engine.save_checkpoint(folder, tag=draw.choice(TAGS), client_state={"number": number})
        if decoupled:
            engine._finish_save()
        pipe.send(number)


def check(folder):
    """The number of the save that loads."""
    engine = engine_at(folder)
    path, client = engine.load_checkpoint(folder)
    assert path is not None, "no checkpoint was found"
    number = client["number"]
    for index, held in enumerate(engine.optimizer.slices):
        for segment in held.segments:
            for value in (held.master, *engine.optimizer.stepper.native.states(index)):
                assert (value.narrow(0, segment.begin, segment.numel) == number).all(), (path, number)
    assert engine.global_steps == number
    engine.destroy()
    return number


def nurse(orders, results, folder, seed, times):
    """Kills jobs one after the other; they are forked from this process, which has imported what they need and runs nothing itself."""
    import deepspeed  # noqa: F401
    import deepspeed.checkpoint.background  # noqa: F401
    import deepspeed.engine  # noqa: F401
    import deepspeed.ops.adam  # noqa: F401
    from deepspeed._native import lib
    lib()
    _die_with_parent()
    draw = random.Random(seed)
    for _ in range(times):
        newest = orders.recv()
        try:
            results.send(("done", kill_once(draw, folder, newest)))
        except BaseException as error:
            results.send(("failed", f"{type(error).__name__}: {error}"))
            return


def kill_once(draw, folder, first):
    """Starts a job, kills a rank of it or all at a random moment; the number of the newest save the job said was over."""
    context = multiprocessing.get_context("fork")
    done, decoupled, seed = first, draw.random() < 0.5, draw.random()
    with tempfile.TemporaryDirectory() as meeting:
        pipes, processes = [], []
        for rank in range(RANKS):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=save_for_ever, daemon=True,
                                      args=(theirs, rank, os.path.join(meeting, "store"), folder, first, decoupled, seed))
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        try:
            for _ in range(draw.randint(1, 3)):
                assert pipes[0].poll(60), "the job does not save"
                done = pipes[0].recv()
            time.sleep(draw.random() * 0.15)
            victims = draw.choice([[0], [1], [0, 1]])
            for rank in victims:
                os.kill(processes[rank].pid, signal.SIGKILL)
            time.sleep(draw.random() * 0.05)
        finally:
            for process in processes:
                process.kill()
            for process in processes:
                process.join()
        while pipes[0].poll():
            try:
                done = pipes[0].recv()
            except EOFError:
                break
    return done


def kill_often(times, seed, folder):
    ours, orders = _context().Pipe(duplex=True)
    nursery = _context().Process(target=nurse, args=(orders, orders, folder, seed, times))
    nursery.start()
    newest = 0
    for turn in range(times):
        ours.send(newest)
        assert ours.poll(120), "the job hangs"
        outcome, done = ours.recv()
        assert outcome == "done", done
        newest = run(check, 1, folder)[0]
        assert newest >= done, f"turn {turn}: save {done} was over, {newest} was loaded"
        yield turn, newest
    nursery.join()
    left = [name for name in os.listdir(folder) if ".part-" in name]
    assert len(left) <= 4, left   # those of the last job; every save removes what the dead have left


@pytest.mark.parametrize("seed", [1])
def test_killed_at_random_moments(seed, tmp_path):
    assert len(list(kill_often(6, seed, str(tmp_path)))) == 6


# ---- a full disk


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 6 MiB."""
    where = tmp_path / "disk"
    where.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", where], capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    yield where
    subprocess.run(["umount", "-l", where], check=True)


def until_full(folder, believe):
    """Saves of 3.1 MiB until there is no more room. believe: the check of free space says there is."""
    from deepspeed.checkpoint import CheckpointError, folders
    engine = engine_at(folder)
    engine.backward(engine(torch.ones(1, dtype=torch.bfloat16)))
    engine.step()
    known = folders.free_bytes
    if believe:
        folders.free_bytes = lambda where: 1 << 40
    try:
        fill(engine, 1)
        engine.save_checkpoint(folder, client_state={"number": 1})
        fill(engine, 2)
        with pytest.raises(CheckpointError, match="No space left" if believe else "the checkpoint needs .* MiB, free are"):
            engine.save_checkpoint(folder, client_state={"number": 2})
    finally:
        folders.free_bytes = known
    engine.destroy()
    assert sorted(os.listdir(folder)) == ["global_step1", "latest", "zero_to_fp32.py", "zero_to_torch.py"]
    assert check(folder) == 1


@pytest.mark.parametrize("believe", [False, True])
def test_a_full_disk(small_disk, believe):
    run(until_full, 2, str(small_disk), believe)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        began = time.time()
        for turn, newest in kill_often(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0, place):
            print(f"{turn + 1} kills, {time.time() - began:.0f} s, save {newest} loaded", flush=True)
