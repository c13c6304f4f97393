# SPDX-License-Identifier: Apache-2.0
"""State in files when the disk misbehaves or the process is killed: the right bits or an error that says what to do, and nothing is left behind.

`python -m tests.faults.test_offload_faults 1000 [seed]` trains that often under random faults.
"""
import contextlib
import os
import random
import signal
import sys
import time

import pytest
import torch
import torch.distributed as dist

from tests.parity.launch import _context, _die_with_parent, on_ranks, run
from tests.parity.test_offload import on_files
from tests.parity.tiny import assert_same, batch, config, engine_of, tiny, train, whole

WIDTH = 65


@contextlib.contextmanager
def faults(text):
    """While engines are built."""
    os.environ["DS_IO_FAULTS"] = text
    try:
        yield
    finally:
        del os.environ["DS_IO_FAULTS"]


def settings(folder, ahead=False):
    zero = on_files(folder, True, True)
    zero["offload_optimizer"]["super_offload"] = ahead
    return config(3, zero=zero, bf16={"enabled": True}, aio={"block_size": 4096}, gradient_clipping=0.0)


def engine_with(text, folder, ahead=False):
    if not text:
        return engine_of(tiny(width=WIDTH), settings(folder, ahead))
    with faults(text):
        return engine_of(tiny(width=WIDTH), settings(folder, ahead))


def wanted(steps, folder):
    engine = engine_with("", folder)
    train(engine, steps, width=WIDTH)
    values = whole(engine.module)
    engine.destroy()
    return values


@pytest.mark.parametrize("carrier", ["uring", "threads"])
@on_ranks(2)
def test_a_slow_and_halting_disk_changes_no_bit(carrier, tmp_path):
    os.environ["DS_IO_ENGINE"] = carrier
    try:
        engine = engine_with("seed=3,cut=0.3,again=0.3,delay=0.2", tmp_path)
    finally:
        del os.environ["DS_IO_ENGINE"]
    train(engine, 5, width=WIDTH)
    got = whole(engine.module)
    engine.destroy()
    assert_same(got, wanted(5, tmp_path))


@on_ranks(1)
def test_a_failed_update_says_so_and_a_checkpoint_goes_on(tmp_path):
    want = wanted(6, tmp_path)
    engine = engine_with("", tmp_path)
    train(engine, 2, width=WIDTH)
    engine.save_checkpoint(str(tmp_path / "saved"))
    engine.destroy()

    engine = engine_with("seed=1,error=0.2", tmp_path)
    with pytest.raises(Exception, match=f"{tmp_path}.*errno"):
        train(engine, 40, width=WIDTH)
    for call in (lambda: train(engine, 1, width=WIDTH), engine.step, lambda: engine.save_checkpoint(str(tmp_path / "bad")),
                 lambda: engine.module(batch(0, width=WIDTH).bfloat16())):
        with pytest.raises(RuntimeError, match="the update of step .* has failed midway.*load_checkpoint"):
            call()
    assert not (tmp_path / "bad").exists()
    engine.destroy()

    engine = engine_with("", tmp_path)   # the disk is well again
    engine.load_checkpoint(str(tmp_path / "saved"))
    train(engine, 4, first=2, width=WIDTH)
    assert_same(whole(engine.module), want)
    engine.destroy()


@pytest.mark.parametrize("ahead", [False, True])
@on_ranks(1)
def test_the_same_engine_goes_on_from_a_checkpoint(ahead, tmp_path):
    """Errors that pass: what a load sets is whole again."""
    want = wanted(5, tmp_path)
    engine = engine_with("seed=5,error=0.02", tmp_path, ahead)
    engine.save_checkpoint(str(tmp_path / "saved"), tag="start")
    done, failures = 0, 0
    while done < 5:
        try:
            train(engine, 1, first=done, width=WIDTH)
            done += 1
            engine.save_checkpoint(str(tmp_path / "saved"), tag=f"step{done}")
        except Exception as error:
            assert "errno" in str(error)
            failures += 1
            engine.load_checkpoint(str(tmp_path / "saved"), tag=f"step{done}" if done else "start")
    assert_same(whole(engine.module), want)
    assert failures > 0
    engine.destroy()


@pytest.mark.parametrize("ahead", [False, True])
@on_ranks(2)
def test_an_error_on_one_rank_is_everyones(ahead, tmp_path):
    want = wanted(3, tmp_path)
    text = "seed=1,error=0.5" if dist.get_rank() == 1 else ""
    engine = engine_with(text, tmp_path, ahead)
    with pytest.raises(RuntimeError, match="the update failed on rank 1: .*errno"):
        train(engine, 1, width=WIDTH)
    with pytest.raises(RuntimeError, match="has failed midway"):
        engine.save_checkpoint(str(tmp_path / "bad"))
    engine.destroy()
    assert_same(want, wanted(3, tmp_path))   # and the ranks still understand each other


@on_ranks(1)
def test_a_failed_update_of_the_optimizer_itself_is_not_saved(tmp_path):
    engine = engine_with("seed=1,error=0.9", tmp_path)
    engine.backward(engine(batch(0, width=WIDTH).bfloat16()))
    with pytest.raises(RuntimeError, match="errno"):
        engine.optimizer.step()
    for call in (engine.optimizer.step, lambda: engine.save_checkpoint(str(tmp_path / "bad")), lambda: engine(batch(0, width=WIDTH).bfloat16())):
        with pytest.raises(RuntimeError, match="failed midway"):
            call()
    engine.destroy()


def soak(folder, runs, seed):
    """How many of `runs` trainings under random faults ended with an error; the others have the right bits."""
    draw, want, failed = random.Random(seed), {}, 0
    for number in range(runs):
        steps = draw.randint(1, 4)
        if steps not in want:
            want[steps] = wanted(steps, folder)
        os.environ["DS_IO_ENGINE"] = draw.choice(["uring", "threads"])
        text = (f"seed={draw.randrange(2**31)},error={draw.choice([0, 0, 0.003, 0.03])},torn={draw.choice([0, 0.003, 0.03])},"
                f"cut={draw.choice([0, 0.3])},again={draw.choice([0, 0.3])},delay={draw.choice([0, 0.05])}")
        ahead = draw.random() < 0.5   # updates are computed beside backward
        engine = engine_with(text, folder, ahead)
        try:
            train(engine, steps, width=WIDTH)
        except Exception as error:
            assert "errno" in str(error), f"run {number}, {text}: {error}"
            failed += 1
        else:
            assert_same(whole(engine.module), want[steps])
        engine.destroy()
    os.environ.pop("DS_IO_ENGINE", None)
    return failed


@on_ranks(1)
def test_random_faults(tmp_path):
    failed = soak(tmp_path, 20, 1)
    assert 0 < failed < 20


# ---------------------------------------------------------------------------------------------------------------- kills


def train_for_ever(pipe, rank, meeting, folder):
    from datetime import timedelta

    import torch.distributed as dist
    _die_with_parent()
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", OMP_NUM_THREADS="1")
    dist.init_process_group("gloo", store=dist.FileStore(meeting, 2), rank=rank, world_size=2, timeout=timedelta(seconds=60))
    pipe.send("started")
    engine = engine_with("", folder)
    pipe.send("built")
    step = 0
    while True:
        train(engine, 1, first=step, width=WIDTH)
        step += 1
        pipe.send(step)


def kill_at_random(folder, times, seed):
    context, draw = _context(), random.Random(seed)
    for number in range(times):
        meeting = os.path.join(folder, f"meeting{number}")
        state = os.path.join(folder, "state")
        pipes, processes = [], []
        for rank in range(2):
            mine, theirs = context.Pipe()
            processes.append(context.Process(target=train_for_ever, args=(theirs, rank, meeting, state), daemon=True))
            processes[-1].start()
            pipes.append(mine)
        assert pipes[0].poll(60), "the job did not start"
        moment = draw.choice(["started", "built", 3])
        while pipes[0].recv() != moment:
            assert pipes[0].poll(60), f"the job did not come to {moment}"
        time.sleep(draw.uniform(0, 0.05))
        for process in processes:
            os.kill(process.pid, signal.SIGKILL)
        for process in processes:
            process.join(30)
        # A file has a name only between two steps of its making.
        left = os.listdir(state) if os.path.isdir(state) else []
        assert all(name.startswith(".deepspeed-") for name in left), left
        assert moment == "started" or not left
    return os.path.join(folder, "state")


def test_kills_leave_nothing_that_matters(tmp_path):
    state = kill_at_random(str(tmp_path), 4, 1)
    run(wanted, 2, 2, state)   # and the folder is as good as new


if __name__ == "__main__":
    import tempfile
    with tempfile.TemporaryDirectory() as place:
        runs = int(sys.argv[1])
        failed = run(soak, 1, place, runs, int(sys.argv[2]) if len(sys.argv) > 2 else 0, timeout=3600)[0]
        print(f"{runs} trainings under random faults: {failed} ended with an error, {runs - failed} with the right bits")
