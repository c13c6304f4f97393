# SPDX-License-Identifier: Apache-2.0
"""Preallocated memory: one block an argument, its slots used again and again."""
import logging

import pytest
import torch

from deepspeed.checkpointing.slots import Slots


def take(slots, numel=6, count=3, argument=0):
    return slots.take(argument, numel, torch.float32, "cpu", False, count)


class Keep(torch.autograd.Function):
    """Saves a slot and gives its sum as the gradient."""

    @staticmethod
    def forward(ctx, x, slots):
        saved = take(slots)
        saved.copy_(x.detach().expand(6))
        ctx.save_for_backward(saved)
        return x * 2

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.saved_tensors[0].sum(), None


def test_a_slot_is_free_when_its_tensor_is_gone():
    slots = Slots()
    held = [take(slots) for _ in range(3)]
    places = {tensor.data_ptr() for tensor in held}
    assert len(places) == 3 and slots.nbytes == 3 * 6 * 4
    held.pop(1)
    held.append(take(slots, 5))
    assert held[-1].shape == (5,) and {tensor.data_ptr() for tensor in held} == places and slots.nbytes == 3 * 6 * 4


def test_arguments_have_blocks_of_their_own():
    slots = Slots()
    one, other = take(slots), take(slots, 7, argument=1)
    assert slots.nbytes == 3 * 6 * 4 + 3 * 7 * 4 and one.data_ptr() != other.data_ptr()


def test_autograd_frees_slots_and_sees_no_change_when_others_are_written():
    slots = Slots()
    for _ in range(4):
        x = torch.ones(1, requires_grad=True)
        y = Keep.apply(Keep.apply(Keep.apply(x, slots), slots), slots)
        y.backward()
        assert x.grad.item() == 2 ** 0 * 6 * 2 * 6 * 4 * 6 and slots.nbytes == 3 * 6 * 4
    x = torch.ones(1, requires_grad=True)
    y = Keep.apply(x, slots)
    y.backward(retain_graph=True)
    take(slots).fill_(9), take(slots).fill_(9), take(slots).fill_(9)
    y.backward()
    assert x.grad.item() == 12


def test_too_few_slots_are_said_and_more_are_made(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("DeepSpeed"), "propagate", True)
    slots = Slots()
    held = [take(slots) for _ in range(4)]
    assert len({tensor.data_ptr() for tensor in held}) == 4
    assert "all 3 preallocated buffers of argument 0 are in use: number_checkpoints is too small" in caplog.text


def test_a_longer_row_gets_a_new_block_and_the_old_one_ends():
    slots = Slots()
    short = take(slots).fill_(1)
    long = take(slots, 60).fill_(2)
    assert slots.nbytes == 3 * 60 * 4 and short.sum() == 6
    del short, long
    assert take(slots, 6).data_ptr() and slots.nbytes == 3 * 60 * 4
    slots.clear()
    assert slots.nbytes == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.complex64])
def test_types(dtype):
    assert Slots().take(0, 3, dtype, "cpu", False, 2).dtype == dtype
