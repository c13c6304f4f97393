# SPDX-License-Identifier: Apache-2.0
"""A backward that somebody's hook breaks off, on all ranks or on one: nobody waits for ever, and after zero_grad() training goes on as if it had not been."""
import pytest
import torch
import torch.distributed as dist

from tests.parity.launch import run
from tests.parity.tiny import assert_same, batch, config, engine_of, tiny, train, whole
from tests.parity.training import transport


class Broken(Exception):
    pass


def _break_at(engine, place):
    """Makes the next backward raise at a layer; returns what ends that."""
    def fail(*_):
        raise Broken
    layer = engine.module.layers[place]
    if place % 2:
        return layer.linear.weight.register_post_accumulate_grad_hook(fail)
    return layer.register_full_backward_hook(fail)


def breaks(carrier, stage, who, place, error=Broken):
    with transport(carrier):
        results = []
        for broken in (True, False):
            engine = engine_of(tiny(), config(stage, gradient_clipping=0.0))
            losses = train(engine, 2)
            if broken:
                mine = who == "all" or dist.get_rank() == who
                handle = _break_at(engine, place) if mine else None
                loss = engine(batch(50))
                if mine:
                    with pytest.raises(error):
                        engine.backward(loss)
                    handle.remove()
                else:
                    engine.backward(loss)
                engine.zero_grad()
                assert all(p.grad is None for p in engine.module.parameters())
            engine.module.seen.fill_(0)
            losses += train(engine, 3, first=2)
            results.append((losses, whole(engine.module)))
            engine.destroy()
    assert results[0][0] == results[1][0]
    assert_same(results[0][1], results[1][1])


@pytest.mark.parametrize("place", [3, 2, 1, 0])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("ranks", [1, 2])
def test_on_all_ranks(ranks, stage, place):
    run(breaks, ranks, "shm", stage, "all", place)


@pytest.mark.parametrize("carrier", ["shm", "c10d"])
@pytest.mark.parametrize("stage,who,place", [(0, 1, 1), (1, 0, 3), (2, 1, 0), (3, 0, 2), (3, 1, 1)])
def test_on_one_rank(carrier, stage, who, place):
    run(breaks, 2, carrier, stage, who, place)
