# SPDX-License-Identifier: Apache-2.0
"""The order of copies to the host and back, on streams that only do their work when somebody waits for it."""
import contextlib

import pytest
import torch
import torch.utils.checkpoint

from deepspeed.checkpointing import checkpoint, configuration, host, non_reentrant_checkpoint, offload_activations, resting
from deepspeed.checkpointing.host import HostCopies, Line


class Event:
    def __init__(self, stream):
        self.stream, self.at = stream, len(stream.queue)


class Stream:
    """Work is done up to an event when another stream waits for that event."""

    def __init__(self):
        self.queue, self.done = [], 0

    def run(self, up_to):
        while self.done < up_to:
            self.queue[self.done]()
            self.queue[self.done] = None
            self.done += 1

    def wait_stream(self, other):
        other.run(len(other.queue))

    def wait_event(self, event):
        event.stream.run(event.at)

    def record_event(self):
        return Event(self)


class LateDevice:
    """What is copied inside `stream(s)` happens when s has been waited for; the main stream works at once."""

    def __init__(self):
        self.main, self.now, self.copies = Stream(), None, []
        self.now = self.main

    def Stream(self):
        return Stream()

    def current_stream(self):
        return self.now

    @contextlib.contextmanager
    def stream(self, stream):
        self.now, before = stream, self.now
        yield
        self.now = before


@pytest.fixture
def device(monkeypatch):
    found = LateDevice()
    monkeypatch.setattr(host, "get_accelerator", lambda: found)
    copy = torch.Tensor.copy_

    def late(target, source, non_blocking=False):
        if not non_blocking:
            return copy(target, source)
        found.copies.append(source)
        found.now.queue.append(lambda: copy(target, source))
        return target

    monkeypatch.setattr(torch.Tensor, "copy_", late)
    return found


def put(line, *values):
    copies, resting_there = HostCopies(line), []
    for value in values:
        resting_there.append(torch.full((3,), -1.0))
        copies.put(torch.full((3,), float(value)), resting_there[-1])
    return copies, resting_there


def test_inputs_may_change_after_settle(device):
    line, source, there = Line(), torch.ones(3), torch.zeros(3)
    copies = HostCopies(line)
    copies.put(source, there)
    assert there.sum() == 0  # still under way
    copies.settle()
    source.zero_()
    assert there.sum() == 3


def test_the_one_before_is_on_its_way_when_one_arrives(device):
    line = Line()
    made = [put(line, 10 * number, 10 * number + 1) for number in range(3)]
    for copies, _ in made:
        copies.settle()
    device.copies.clear()
    for number in (2, 1, 0):
        copies, _ = made[number]
        assert [tensor.tolist() for tensor in copies.bring()] == [[10.0 * number] * 3, [10.0 * number + 1] * 3]
        assert len(device.copies) == 2 * min(3, 4 - number)  # its own two, and two of the one before
    assert [t[0].item() for t in made[2][0].bring()] == [20.0, 21.0]  # a second backward


def test_what_autograd_let_go_is_not_fetched(device):
    line = Line()
    (first, first_there), (second, second_there) = put(line, 1), put(line, 2)
    first.settle(), second.settle()
    first_there.clear()
    second.bring()
    assert first._arriving is None


def test_memory_of_a_copy_that_nobody_took_is_waited_for(device):
    line = Line()
    (first, first_there), (second, second_there) = put(line, 1), put(line, 2)
    first.settle(), second.settle()
    second.bring()
    stream = line.stream()
    assert stream.done < len(stream.queue)
    del first
    assert stream.done == len(stream.queue)



def test_the_host_is_where_a_cpu_keeps_them(monkeypatch):
    """On a CPU the very tensor is held: nothing is copied."""
    configuration.state().accept(configuration.Options(checkpoint_in_cpu=True))
    try:
        x = torch.ones(5, requires_grad=True) * 2
        inputs = resting.SavedInputs([x, 3], print)
        assert inputs.tensors[0] is x and len(inputs.tensors) == 1
    finally:
        configuration.state().accept(configuration.Options(), configured=False)


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(400, 400)

    def forward(self, x):
        return torch.tanh(self.linear(x))


def torch_reentrant(block, x):
    return torch.utils.checkpoint.checkpoint(block, x, use_reentrant=True)


def torch_non_reentrant(block, x):
    return torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)


@pytest.mark.parametrize("way", [torch_reentrant, torch_non_reentrant, checkpoint, non_reentrant_checkpoint])
@pytest.mark.parametrize("keep, stash", [(0, 0), (1, 2), (9, 0)])
def test_inputs_of_checkpointed_layers_go_to_the_host(device, monkeypatch, way, keep, stash):
    blocks = [Block() for _ in range(5)]

    def train():
        for block in blocks:
            block.zero_grad()
        x = torch.full((2, 400), 0.1, requires_grad=True)
        y = x * 1.0
        for block in blocks:
            y = way(block, y)
        torch.exp(y).sum().backward()
        return [x.grad, *(p.grad for block in blocks for p in block.parameters())]

    want = train()
    monkeypatch.setattr(offload_activations, "_on_the_device", lambda tensor: True)
    for pass_ in range(2):
        device.copies.clear()
        with offload_activations.get_checkpoint_hidden_states_offloading_ctx_manager(
                use_pin_memory=False, max_fwd_stash_count=stash, keep_last_count=keep):
            got = train()
        assert all(torch.equal(a, b) for a, b in zip(got, want))
        down = max(0, 5 - keep)  # nothing but the inputs of the five blocks; the last on their way down need not come up
        assert len(device.copies) == down + max(0, down - stash)


def test_an_input_that_changes_on_its_way_is_an_error(device, monkeypatch):
    monkeypatch.setattr(offload_activations, "_on_the_device", lambda tensor: True)
    x = torch.full((2, 400), 0.1, requires_grad=True) * 1
    with pytest.raises(RuntimeError, match="changed in place while it was copied to the host"):
        with offload_activations.get_checkpoint_hidden_states_offloading_ctx_manager(use_pin_memory=False, keep_last_count=0):
            torch_non_reentrant(Block(), x)
            x.add_(1)


def test_on_a_cpu_nothing_moves():
    x = torch.full((2, 400), 0.1, requires_grad=True) * 1
    with offload_activations.get_checkpoint_hidden_states_offloading_ctx_manager() as context:
        torch_non_reentrant(Block(), x)
    assert context._line.newest is None
    for bad in (dict(keep_last_count=-1), dict(min_offload_bytes="1K"), dict(max_fwd_stash_count=True)):
        with pytest.raises(ValueError, match=next(iter(bad))):
            offload_activations.get_checkpoint_hidden_states_offloading_ctx_manager(**bad)
