# SPDX-License-Identifier: Apache-2.0
"""The pool of ranks itself: results, reuse, failures, deaths, hangs."""
import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from tests.parity.launch import RankFailure, on_ranks, run


class Point:
    def __init__(self, x):
        self.x = x


def pid():
    return os.getpid()


def sum_of_ranks(offset, point=None):
    value = torch.tensor([float(dist.get_rank() + offset)])
    dist.all_reduce(value)
    return value.item() + (point.x if point else 0)


def environment():
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), torch.get_num_threads()


def raise_on(rank):
    if dist.get_rank() == rank:
        raise KeyError("the culprit")
    dist.barrier()


def die_on(rank):
    print("last words", flush=True)
    if dist.get_rank() == rank:
        os.kill(os.getpid(), signal.SIGSEGV)
    dist.barrier()


def hang_here():
    time.sleep(1000)


def skip_here():
    pytest.skip("not on this machine")


def leave_the_group():
    dist.destroy_process_group()


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_results_come_in_rank_order(world_size):
    assert run(environment, world_size) == [(r, world_size, 1) for r in range(world_size)]


def test_arguments_may_be_of_the_tests_classes():
    assert run(sum_of_ranks, 2, 10, point=Point(5)) == [26.0, 26.0]


def test_processes_are_reused():
    assert run(pid, 2) == run(pid, 2)


def test_first_traceback_is_shown_and_the_pool_rebuilt():
    before = run(pid, 2)
    with pytest.raises(RankFailure, match=r"(?s)rank 1 of 2 raised.*raise_on.*KeyError: 'the culprit'") as failure:
        run(raise_on, 2, 1)
    assert failure.value.rank == 1
    assert not set(before) & set(run(pid, 2))
    for old in before:
        with pytest.raises(ProcessLookupError):
            os.kill(old, 0)


def test_death_names_the_signal_and_shows_the_output():
    with pytest.raises(RankFailure, match=r"(?s)rank 0 of 2 was killed by SIGSEGV.*last words"):
        run(die_on, 2, 0)
    assert run(sum_of_ranks, 2, 0) == [1.0, 1.0]


def test_a_hang_shows_the_stacks():
    with pytest.raises(RankFailure, match=r"(?s)ranks \[0, 1\] of 2 not done after 1 s.*hang_here"):
        run(hang_here, 2, timeout=1)


def test_skip_passes_through():
    with pytest.raises(pytest.skip.Exception, match="not on this machine"):
        run(skip_here, 2)


def test_a_destroyed_group_is_replaced():
    run(leave_the_group, 2)
    assert run(sum_of_ranks, 2, 0) == [1.0, 1.0]


def test_nested_functions_are_refused():
    with pytest.raises(ValueError, match="module level"):
        run(lambda: None, 2)


@pytest.mark.parametrize("value", [1, 2])
@on_ranks(2)
def test_decorated_body_runs_on_ranks(value):
    total = torch.tensor([value])
    dist.all_reduce(total)
    assert total.item() == 2 * value and dist.get_world_size() == 2


@on_ranks(2)
def test_seeds_are_equal_on_all_ranks():
    mine = torch.rand(3)
    theirs = mine.clone()
    dist.broadcast(theirs, 0)
    assert torch.equal(mine, theirs)
