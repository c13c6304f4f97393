# SPDX-License-Identifier: Apache-2.0
"""engine.join() in every way of driving the engine: the same bits as when a rank without data runs on with a loss of zero."""
import pytest
import torch
import torch.distributed as dist

from tests.parity import tiny
from tests.parity.launch import on_ranks, run
from tests.parity.training import transport

BATCHES = (3, 6)   # by rank: the first one leaves in the middle of an accumulation


def two_forwards(engine, loss, step):
    engine.backward(loss(0) + loss(1))
    engine.step()


def two_backwards(engine, loss, step):
    engine.backward(loss(0))
    engine.backward(loss(1))
    engine.step()


def plain_backward(engine, loss, step):
    (loss(0) + loss(1)).backward()
    engine.step()


def boundary_from_outside(engine, loss, step):
    engine.set_gradient_accumulation_boundary(step % 2 == 1)
    engine.backward(loss(0))
    engine.step()


def step_at_boundary_only(engine, loss, step):
    engine.set_gradient_accumulation_boundary(step % 2 == 1)
    engine.backward(loss(0))
    if step % 2 == 1:
        engine.step()


def no_sync(engine, loss, step):
    if step % 2 == 0:
        with engine.no_sync():
            engine.backward(loss(0))
    else:
        engine.backward(loss(0))
        engine.step()


def coalesced(engine, loss, step):
    with engine.coalesce_grad_reduction():
        engine.backward(loss(0))
        engine.backward(loss(1))
    engine.step()


def forwards_alone(engine, loss, step):
    with torch.no_grad():
        loss(1)
    engine.eval()
    loss(1)
    engine.train()
    engine.backward(loss(0))
    engine.step()


def rate_by_hand(engine, loss, step):
    for group in engine.optimizer.param_groups:
        group["lr"] = 1e-2 / (1 + step)
    engine.backward(loss(0))
    engine.step()


WAYS = {way.__name__: way for way in (two_forwards, two_backwards, plain_backward, boundary_from_outside, step_at_boundary_only, no_sync,
                                      coalesced, forwards_alone, rate_by_hand)}
ACCUMULATE = {"plain_backward", "boundary_from_outside", "step_at_boundary_only", "no_sync"}


def drive(way, stage, joined):
    engine = tiny.engine_of(tiny.tiny(), tiny.config(stage, gradient_accumulation_steps=2 if way in ACCUMULATE else 1))
    if way == "no_sync":
        engine.set_gradient_accumulation_boundary(True)
    mine = BATCHES[dist.get_rank()]

    def turn(step):
        def loss(number):
            return engine(tiny.batch(2 * step + number)) * float(step < mine)
        WAYS[way](engine, loss, step)

    if joined:
        with engine.join():
            for step in range(mine):
                turn(step)
    else:
        for step in range(max(BATCHES)):
            turn(step)
    found = (engine.global_steps, engine.get_global_grad_norm(), tiny.whole(engine.module))
    engine.destroy()
    return found


def every_stage(way):
    for choice in ("shm", "c10d"):
        with transport(choice):
            for stage in (0, 1, 3):
                steps, norm, params = drive(way, stage, joined=True)
                want_steps, want_norm, want = drive(way, stage, joined=False)
                assert (steps, norm) == (want_steps, want_norm), (choice, stage)
                tiny.assert_same(params, want)


@pytest.mark.parametrize("way", WAYS)
def test_ranks_without_data_follow(way):
    run(every_stage, 2, way, timeout=60)


@on_ranks(2, timeout=30)
@pytest.mark.parametrize("stage", [1, 3])
def test_ranks_that_do_different_things_are_told(stage):
    engine = tiny.engine_of(tiny.tiny(), tiny.config(stage, gradient_accumulation_steps=2))
    with pytest.raises(RuntimeError, match="join: .* rank 0 begins a forward, rank 1 a backward"):
        with engine.join():
            loss = engine(tiny.batch(0))
            if dist.get_rank() == 0:
                loss = loss + engine(tiny.batch(1))
            engine.backward(loss)
    engine.destroy()


@on_ranks(2, timeout=30)
def test_a_boundary_that_ranks_see_differently_is_refused():
    engine = tiny.engine_of(tiny.tiny(), tiny.config(1, gradient_accumulation_steps=2))
    engine.set_gradient_accumulation_boundary(dist.get_rank() == 0)
    with pytest.raises(RuntimeError, match="join: .* rank 0 begins a step at the boundary .*, rank 1 a step before the boundary"):
        with engine.join():
            engine.backward(engine(tiny.batch(0)))
            engine.step()
    engine.destroy()


@on_ranks(2, timeout=30)
def test_one_context_at_a_time():
    engines = [tiny.engine_of(tiny.tiny(), tiny.config(1)) for _ in range(2)]
    with engines[0].join():
        with pytest.raises(RuntimeError, match="do not nest"):
            engines[1].join().__enter__()
    for engine in engines:
        engine.destroy()
