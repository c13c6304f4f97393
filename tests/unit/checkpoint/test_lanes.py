# SPDX-License-Identifier: Apache-2.0
"""What a rank writes is divided evenly among threads, and nothing is lost or doubled."""
import random
import threading

import pytest
import torch

from deepspeed.checkpoint import lanes
from deepspeed.checkpoint.pieces import Piece


def piece(name, numel, dtype=torch.float32, begin=0):
    return Piece(name, "fp32", (begin + numel,), (), begin, torch.arange(numel).to(dtype))


def put_together(parts):
    """{name: (first element, values)}; the parts of one piece must follow each other."""
    found = {}
    for part in parts:
        begin, values = found.get(part.name, (part.begin, []))
        assert part.begin == begin + sum(map(len, values))
        found[part.name] = (begin, [*values, part.data])
    return {name: (begin, torch.cat(values)) for name, (begin, values) in found.items()}


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_every_element_once_in_order_and_evenly(count, monkeypatch):
    monkeypatch.setattr(lanes, "LEAST_BYTES", 4096)
    draw = random.Random(count)
    for _ in range(40):
        sizes = [draw.choice([0, 1, 1023, 1024, 1025, draw.randrange(200_000)]) for _ in range(draw.randrange(1, 9))]
        pieces = [piece(f"p{i}", n, draw.choice([torch.float32, torch.bfloat16, torch.float64]), draw.randrange(5)) for i, n in enumerate(sizes)]
        cut = lanes.lanes_of(pieces, count)
        total = sum(p.data.numel() * p.data.element_size() for p in pieces)
        assert 1 <= len(cut) <= count
        for lane in cut:
            assert sum(p.data.numel() * p.data.element_size() for p in lane) <= total / min(count, max(1, total // 4096)) + count * 8 * 1024
        joined = put_together([p for lane in cut for p in lane])
        assert list(joined) == [p.name for p in pieces]
        for p in pieces:
            begin, values = joined[p.name]
            assert begin == p.begin and values.dtype == p.data.dtype and torch.equal(values, p.data)
            assert values.numel() == 0 or p.data.data_ptr() in [q.data.data_ptr() for lane in cut for q in lane]   # views, no copies


def test_little_is_written_by_one_thread():
    pieces = [piece("a", 1000), piece("b", 10)]
    assert lanes.lanes_of(pieces, 4) == [pieces]


def test_names_differ_and_the_first_is_the_plain_one():
    names = [lanes.lane_name("state_00000_of_00002.safetensors", number) for number in range(3)]
    assert names == ["state_00000_of_00002.safetensors", "state_00000_of_00002.1.safetensors", "state_00000_of_00002.2.safetensors"]


def test_work_goes_on_abreast_and_its_first_error_is_raised():
    both = threading.Barrier(2, timeout=30)
    assert lanes.abreast(lambda value: (both.wait(), value)[1], [(1,), (2,)], 2) == [1, 2]
    ended = []

    def work(value):
        try:
            both.wait()
            if value == 2:
                raise OSError("full")
        finally:
            ended.append(value)

    with pytest.raises(OSError, match="full"):
        lanes.abreast(work, [(1,), (2,)], 2)
    assert sorted(ended) == [1, 2]
