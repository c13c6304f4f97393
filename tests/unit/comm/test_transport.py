# SPDX-License-Identifier: Apache-2.0
"""The transport's Python face, in one process. What needs ranks is in tests/parity/test_transport.py."""
import gc

import pytest
import torch

from deepspeed._native import lib


@pytest.fixture
def transport():
    return lib().make_transport("", max_channels=2)


def test_one_rank_needs_no_process_group(transport):
    assert (transport.name, transport.rank, transport.size) == ("local", 0, 1)
    assert not transport.needs_matching_order


def test_buffer_is_zero_aligned_and_outlives_the_transport(transport):
    buffer = transport.allocate(5_000_001)
    view = buffer.tensor()
    assert view.dtype == torch.uint8 and view.numel() == buffer.bytes == 5_000_001
    assert view.data_ptr() % (2 << 20) == 0 and not view.any()
    part = view[100:104].view(torch.float32)
    del buffer, view, transport
    gc.collect()
    part.fill_(2.5)
    assert part.item() == 2.5


def test_gather_reduce_and_small_collectives_are_done_at_once(transport):
    buffer = transport.allocate(64)
    floats = buffer.tensor().view(torch.float32)
    floats.copy_(torch.arange(16))
    buffer.publish()
    assert buffer.epoch == 1
    out = torch.zeros(4)
    work = transport.all_gather(out, buffer, 16, 0, 16, phase="param", step=3, unit=1)
    work.wait()
    assert out.tolist() == [4, 5, 6, 7] and work.test()
    seen = []
    reduce = transport.reduce_scatter(buffer, 32, 8, 1, torch.float32, lambda srcs: seen.append([s.view(torch.float32).clone() for s in srcs]),
                                      phase="grad")
    assert reduce.test() and reduce.drained()
    assert [s.tolist() for s in seen[0]] == [[8, 9]]
    assert transport.all_reduce([1.5, -2.0], "max") == [1.5, -2.0]
    assert transport.all_gather_host(b"abc") == [b"abc"]
    assert transport.counts() == {"param": (1, 16), "grad": (1, 8), "": (2, 19)}
    record = transport.recent()[0]
    assert (record["kind"], record["phase"], record["step"], record["unit"], record["bytes"], record["state"]) == (
        "all_gather", "param", 3, 1, 16, "done")
    assert record["end_s"] >= record["start_s"] > 1e9
    transport.reset_counts()
    assert transport.count("param") == (0, 0)


def test_a_raising_sink_raises_here(transport):
    buffer = transport.allocate(8)

    def sink(srcs):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        transport.reduce_scatter(buffer, 0, 8, 0, torch.float32, sink)


@pytest.mark.parametrize("arguments, message", [
    (dict(choice="fast"), 'choice must be "auto", "shm" or "c10d", got "fast"'),
    (dict(max_channels=0), "max_channels must be in"),
    (dict(timeout_s=0), "timeout_s must be positive"),
    (dict(device="meta"), "neither cpu nor cuda"),
])
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        lib().make_transport("", **arguments)


def test_bad_ranges_are_named(transport):
    buffer = transport.allocate(64)
    with pytest.raises(ValueError, match="out has 4 bytes, needs 8"):
        transport.all_gather(torch.zeros(1), buffer, 0, 0, 8)
    with pytest.raises(ValueError, match="outside a buffer of 64"):
        transport.all_gather(torch.zeros(2), buffer, 60, 0, 8)
    with pytest.raises(ValueError, match="no whole number of F32"):
        transport.reduce_scatter(buffer, 0, 6, 0, torch.float32, print)
    with pytest.raises(ValueError, match="channel 2 of 2"):
        transport.reduce_scatter(buffer, 0, 8, 2, torch.float32, print)
    with pytest.raises(ValueError, match='op must be'):
        transport.all_reduce([1.0], "avg")
    with pytest.raises(ValueError, match="contiguous"):
        transport.broadcast(torch.zeros(4, 4).t(), 0)
