# SPDX-License-Identifier: Apache-2.0
"""Cutting a row of items into consecutive parts. Pure integers: part i is [bounds[i], bounds[i + 1])."""
from itertools import accumulate


def prefix_sum_inc(weights):
    """Running sums, each including its own item."""
    return list(accumulate(weights))


def partition_uniform(num_items, num_parts):
    """Bounds of `num_parts` parts whose sizes differ by at most one, larger ones first."""
    small, larger = divmod(num_items, num_parts)
    return [part * small + min(part, larger) for part in range(num_parts + 1)]


def partition_balanced(weights, num_parts):
    """Bounds that make the heaviest part as light as possible; no part is empty while there are enough items."""
    if num_parts < 1:
        raise ValueError(f"num_parts must be positive, got {num_parts}")
    if len(weights) <= num_parts:
        return partition_uniform(len(weights), num_parts)
    best = _fill(weights, num_parts, sum(weights))
    low, high = max(weights), best.heaviest  # the answer is a sum of consecutive weights in [low, high]
    while low < high:
        limit = (low + high) / 2
        limit = limit if limit < high else low  # neighbouring floats have nothing between them
        attempt = _fill(weights, num_parts, limit)
        if attempt.heaviest <= limit:
            best, high = attempt, attempt.heaviest
        else:
            low = attempt.next_limit
    return best.bounds


class _Filling:
    """Parts filled from the left up to `limit`. The last takes the rest, so `heaviest` may exceed the limit."""

    def __init__(self, bounds, heaviest, next_limit):
        self.bounds = bounds
        self.heaviest = heaviest
        self.next_limit = next_limit  # smallest limit that changes the filling


def _fill(weights, num_parts, limit):
    bounds, start, heaviest, next_limit = [0], 0, 0, float("inf")
    for part in range(num_parts):
        left = num_parts - part - 1  # parts that still need an item each
        end, total = start + 1, weights[start]
        while left and end < len(weights) - left:
            if total + weights[end] > limit:
                next_limit = min(next_limit, total + weights[end])
                break
            total += weights[end]
            end += 1
        if not left:
            total, end = sum(weights[start:]), len(weights)
        heaviest = max(heaviest, total)
        bounds.append(end)
        start = end
    return _Filling(bounds, heaviest, min(next_limit, heaviest) if heaviest > limit else next_limit)
