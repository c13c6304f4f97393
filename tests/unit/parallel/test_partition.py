# SPDX-License-Identifier: Apache-2.0
import itertools
import random

import pytest

from deepspeed.runtime.utils import get_only_unique_item, partition_balanced, partition_uniform, prefix_sum_inc


def test_prefix_sum():
    assert prefix_sum_inc([3, 4, 5]) == [3, 7, 12] and prefix_sum_inc([]) == []


@pytest.mark.parametrize("items,parts,bounds", [(8, 4, [0, 2, 4, 6, 8]), (10, 3, [0, 4, 7, 10]), (2, 4, [0, 1, 2, 2, 2]), (0, 2, [0, 0, 0])])
def test_uniform(items, parts, bounds):
    assert partition_uniform(items, parts) == bounds


def best_possible(weights, parts):
    cuts = itertools.combinations(range(1, len(weights)), parts - 1)
    return min(max(sum(weights[a:b]) for a, b in zip((0, *cut), (*cut, len(weights)))) for cut in cuts)


@pytest.mark.parametrize("seed", range(200))
def test_balanced_is_optimal_and_leaves_no_part_empty(seed):
    draw = random.Random(seed)
    parts = draw.randint(1, 5)
    weights = [draw.choice((draw.randint(0, 9), draw.random() * 3)) for _ in range(draw.randint(parts, 9))]
    bounds = partition_balanced(weights, parts)
    assert bounds[0] == 0 and bounds[-1] == len(weights) and len(bounds) == parts + 1
    assert all(a < b for a, b in zip(bounds, bounds[1:]))
    heaviest = max(sum(weights[a:b]) for a, b in zip(bounds, bounds[1:]))
    # sums in another order: a few roundings of numbers below 100
    assert heaviest <= best_possible(weights, parts) + 1e-13 * 100


def test_balanced_with_fewer_items_than_parts():
    assert partition_balanced([5, 1], 3) == [0, 1, 2, 2]
    with pytest.raises(ValueError, match="num_parts must be positive"):
        partition_balanced([1], 0)


def test_only_unique_item():
    assert get_only_unique_item([3, 3]) == 3
    for items in ([], [1, 2]):
        with pytest.raises(RuntimeError, match="expected one value"):
            get_only_unique_item(items)
