# SPDX-License-Identifier: Apache-2.0
"""Operators and optimizers use torch's threads: a library compiled without OpenMP would compute the same, on one."""
import os
import threading

import pytest
import torch

from deepspeed.ops.adam import FusedAdam
from deepspeed.ops.softmax import scaled_masked_softmax


def _softmax():
    x = torch.ones(4096, 256)
    return lambda: scaled_masked_softmax(x)


def _step():
    p = torch.nn.Parameter(torch.ones(2**20))
    p.grad = torch.ones_like(p)
    optimizer = FusedAdam([p])
    optimizer.step()
    return optimizer.step


@pytest.mark.parametrize("make", [_softmax, _step])
@pytest.mark.parametrize("threads", [1, 3])
def test_threads(make, threads):
    """A thread that is new has no helpers yet; those of its first parallel work stay with it."""
    work, started = make(), []

    def body():
        torch.set_num_threads(threads)
        before = len(os.listdir("/proc/self/task"))
        work()
        started.append(len(os.listdir("/proc/self/task")) - before)

    usual = torch.get_num_threads()
    try:
        thread = threading.Thread(target=body)
        thread.start()
        thread.join()
    finally:
        torch.set_num_threads(usual)
    assert started == [threads - 1]
