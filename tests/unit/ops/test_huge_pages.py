# SPDX-License-Identifier: Apache-2.0
"""Large gradients that stay where they are from update to update move into huge pages; those that come and go are left alone."""
import gc
import mmap
import re

import pytest
import torch

from deepspeed.ops.adam import FusedAdam

MADV_COLLAPSE = 25  # asm-generic/mman-common.h
NUMEL = 2**22  # 16 MiB: seven whole huge pages at least


def huge_bytes(t):
    """Of the memory mappings that hold t, as the kernel counts them."""
    begin, end, inside, total = t.data_ptr(), t.data_ptr() + t.nbytes, False, 0
    with open("/proc/self/smaps") as file:
        for line in file:
            bounds = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
            if bounds:
                inside = int(bounds[1], 16) < end and int(bounds[2], 16) > begin
            elif inside and line.startswith("AnonHugePages:"):
                total += int(line.split()[1]) * 1024
    return total


@pytest.fixture
def needs_huge_pages(monkeypatch):
    """Asks the kernel itself, not the library: a library that no longer asks must fail."""
    monkeypatch.delenv("DS_HUGE_PAGES", raising=False)
    memory = mmap.mmap(-1, 4 * NUMEL, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    probe = torch.frombuffer(memory, dtype=torch.float32).fill_(1.0)
    try:
        memory.madvise(mmap.MADV_HUGEPAGE)
        memory.madvise(MADV_COLLAPSE)
        given = huge_bytes(probe)
    except OSError as error:
        pytest.skip(f"this machine's kernel has no MADV_COLLAPSE (Linux 6.1) or no /proc/self/smaps: {error}")
    if given < probe.nbytes // 2:
        pytest.skip("this machine's kernel gives no huge pages on demand (transparent_hugepage)")


def mapped(value):
    """A tensor in a mapping of its own, whose pages count for nothing else."""
    memory = mmap.mmap(-1, 4 * NUMEL, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=torch.float32).fill_(value)


def test_a_gradient_that_stays_moves_into_huge_pages(needs_huge_pages):
    p = torch.nn.Parameter(torch.ones(NUMEL))
    p.grad = mapped(0.5)
    optimizer = FusedAdam([p], lr=0.1)
    optimizer.step()
    assert huge_bytes(p.grad) < p.grad.nbytes // 2
    optimizer.step()
    assert huge_bytes(p.grad) >= p.grad.nbytes // 2
    assert torch.equal(p.grad, torch.full((NUMEL,), 0.5))


def test_gradients_that_come_and_go_are_left_alone_and_forgotten(needs_huge_pages):
    p = torch.nn.Parameter(torch.ones(NUMEL))
    optimizer = FusedAdam([p], lr=0.1)
    for _ in range(4):
        p.grad = mapped(0.5)
        optimizer.step()
        assert huge_bytes(p.grad) < p.grad.nbytes // 2
        p.grad = None
        gc.collect()
