# SPDX-License-Identifier: Apache-2.0
"""Tensors that are computed with before they are read have the values that they would have had, by any range."""
import pytest
import torch

from deepspeed.checkpoint import deferred, range_views
from deepspeed.checkpoint.deferred import Deferred, held, materialise


class Counting:
    """A reader that notes how many elements were asked for."""

    def __init__(self, tensor):
        self._reader = held(tensor)
        self.shape, self.dtype, self.numel = self._reader.shape, self._reader.dtype, self._reader.numel
        self.read = 0

    def read_into(self, begin, buffer):
        self._reader.read_into(begin, buffer)
        self.read += len(memoryview(buffer).cast("B")) // 4


EXPRESSIONS = {
    "stack and cat, as experts are fused": lambda a, b, c: torch.cat([torch.stack([a, b]), torch.stack([b, a])], dim=1),
    "cat of the last dimension": lambda a, b, c: torch.cat([a, c, b], dim=-1),
    "chunk": lambda a, b, c: torch.chunk(a, 3, dim=0)[1].contiguous(),
    "split of the last dimension": lambda a, b, c: torch.split(a, [1, 3, 2], dim=1)[1].contiguous(),
    "reshape and select": lambda a, b, c: a.reshape(3, 2, -1)[1],
    "slice and unbind": lambda a, b, c: torch.stack(b[2:5].unbind(1)),
    "convert": lambda a, b, c: torch.cat([a, b]).to(torch.bfloat16).to(torch.float16),
    "transpose": lambda a, b, c: torch.cat([a.transpose(0, 1), b.T], dim=0),
    "interleave": lambda a, b, c: a.reshape(6, 2, 3).transpose(1, 2).reshape(a.shape).contiguous(),
    "arithmetic": lambda a, b, c: (a * 2 + b).sum(dim=0, keepdim=True).expand(4, -1),
    "values decide": lambda a, b, c: a[:, a.abs().sum(0) > 0],
    "squeeze": lambda a, b, c: a.unsqueeze(1).squeeze(1),
}


@pytest.mark.parametrize("small_run", [0, 1 << 20], ids=["run by run", "in tables"])
@pytest.mark.parametrize("name", EXPRESSIONS)
def test_every_range(name, small_run, monkeypatch):
    monkeypatch.setattr(range_views, "_SMALL_RUN_BYTES", small_run)
    monkeypatch.setattr(range_views, "_CHUNK_BYTES", 128)
    plain = [torch.randn(6, 6), torch.randn(6, 6), torch.randn(6, 5)]
    wanted = EXPRESSIONS[name](*plain).contiguous()
    found = EXPRESSIONS[name](*(Deferred(held(tensor)) for tensor in plain))
    assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
    found = found if isinstance(found, Deferred) else Deferred(held(found))
    assert torch.equal(materialise(found), wanted)
    flat = wanted.view(-1)
    for begin in range(flat.numel()):
        for end in (begin + 1, begin + 7, flat.numel()):
            part = torch.empty(min(end, flat.numel()) - begin, dtype=flat.dtype)
            found.reader.read_into(begin, part.view(torch.uint8).numpy())
            assert torch.equal(part, flat[begin:end])
    deferred.forget_results()


def test_only_the_range_is_read():
    readers = [Counting(torch.randn(1024, 64)) for _ in range(8)]
    fused = torch.stack([Deferred(reader) for reader in readers])
    half = torch.empty(4 * 1024 * 64)
    fused.reader.read_into(0, half.view(torch.uint8).numpy())
    assert [reader.read for reader in readers] == [1024 * 64] * 4 + [0] * 4


def test_writing_is_an_error():
    with pytest.raises(RuntimeError, match="has not been read"):
        Deferred(held(torch.ones(3))).mul_(2)


def test_what_nobody_reads_is_not_computed():
    class Refusing(Counting):
        def read_into(self, begin, buffer):
            raise AssertionError("read")

    result = torch.sin(Deferred(Refusing(torch.ones(5)))) + 1
    assert result.shape == (5,)
    with pytest.raises(AssertionError, match="read"):
        materialise(result)
