# SPDX-License-Identifier: Apache-2.0
"""The tests of cross-entropy's operators with tensors on a GPU."""
import pytest
import torch

from deepspeed.ops.cross_entropy import cross_entropy, linear_cross_entropy
from tests.unit.ops.test_cross_entropy import *  # noqa: F401,F403

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
del test_threads_change_no_bit_of_the_rows  # noqa: F821  (nothing of it is on a device)
del test_labels_out_of_range_are_named_by_position  # noqa: F821  (here nothing waits to look: below)


@pytest.fixture
def device():
    return "cuda"


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("bad", [-1, 10, 2**40])
def test_labels_out_of_range_make_nan_and_are_told_later(device, bad, reduction):
    labels = torch.tensor([0, 3, 9, bad, 1, bad], device=device)
    good = torch.tensor([0, 3, 9, 2, 1, 2], device=device)
    hidden, weight = (torch.randn(rows, 4, device=device, requires_grad=True) for rows in (6, 10))
    calls = (lambda labels: cross_entropy(hidden @ weight.t(), labels, ignore_index=3, reduction=reduction),
             lambda labels: linear_cross_entropy(hidden, weight, labels, ignore_index=3, reduction=reduction, chunk_tokens=2))
    for call in calls:
        call(good)
        loss = call(labels)
        assert loss.isnan().tolist() == ([False, False, False, True, False, True] if reduction == "none" else True)
        said = str(max(min(bad, 2**31 - 1), -2**31))
        with pytest.raises(ValueError, match=rf"labels\[[35]\] of an earlier cross-entropy on cuda:0 was {said}"):
            call(good)
        losses = call(labels)
        torch.cuda.synchronize()
        with pytest.raises(ValueError, match="earlier cross-entropy"):  # whatever asks next
            call(good)
        assert call(good).isfinite().all() and losses.isnan().any()


def test_nothing_waits(device):
    labels = torch.randint(10, (6,), device=device)
    hidden, weight = (torch.randn(rows, 4, device=device, requires_grad=True) for rows in (6, 10))
    cross_entropy(hidden @ weight.t(), labels).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for reduction in ("sum", "mean"):
            cross_entropy(hidden @ weight.t(), labels, reduction=reduction).backward()
            linear_cross_entropy(hidden, weight, labels, reduction=reduction).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
