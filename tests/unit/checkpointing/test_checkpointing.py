# SPDX-License-Identifier: Apache-2.0
"""Recomputed activations change no bit: outputs, gradients and random numbers are those of the plain run."""
import types

import pytest
import torch

import deepspeed
from deepspeed import checkpointing
from deepspeed.checkpointing import configuration, recompute
from deepspeed.device import get_accelerator

BOTH = [checkpointing.checkpoint, checkpointing.non_reentrant_checkpoint]


@pytest.fixture(autouse=True)
def as_at_start():
    yield
    configuration.state().accept(configuration.Options(), configured=False)
    checkpointing.get_cuda_rng_tracker().reset()


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(8, 8)
        self.runs = 0

    def forward(self, x, scale=1.0, extra=None):
        self.runs += 1
        y = torch.nn.functional.dropout(torch.relu(self.linear(x)), 0.5) * scale
        return y if extra is None else (y + extra, extra.sum())


def train(block, run):
    torch.manual_seed(3)
    block.zero_grad()
    x = torch.arange(16.0).view(2, 8).div(16).requires_grad_()
    out = run(x)
    out.square().sum().backward()
    return out.detach(), x.grad, block.linear.weight.grad.clone(), torch.rand(2)


@pytest.mark.parametrize("checkpoint", BOTH)
def test_same_bits_and_run_twice(checkpoint):
    torch.manual_seed(0)
    block = Block()
    expected = train(block, block)
    assert block.runs == 1
    got = train(block, lambda x: checkpoint(block, x))
    assert block.runs == 3
    assert all(torch.equal(a, b) for a, b in zip(expected, got))


@pytest.mark.parametrize("checkpoint", BOTH)
def test_keyword_arguments_non_tensors_and_tuples(checkpoint):
    block = Block()
    extra = torch.ones(2, 8, requires_grad=True)

    def run(x):
        out, total = checkpoint(block, x, 2.0, extra=extra)
        return out + total

    extra.grad = None
    got = train(block, run)
    extra_grad, extra.grad = extra.grad, None
    expected = train(block, lambda x: sum(block(x, 2.0, extra=extra)))
    assert all(torch.equal(a, b) for a, b in zip(expected, got)) and torch.equal(extra.grad, extra_grad)


def test_non_reentrant_needs_no_input_with_a_gradient():
    block = Block()
    checkpointing.non_reentrant_checkpoint(block, torch.ones(2, 8)).sum().backward()
    assert block.linear.weight.grad is not None


@pytest.mark.parametrize("checkpoint", BOTH)
def test_tracked_random_states_are_replayed(checkpoint):
    """Dropout inside fork() must drop the same elements in the second run, and the tracked state must go on as if run once."""
    tracker = checkpointing.get_cuda_rng_tracker()
    seen = []

    def noisy(x):
        with tracker.fork():
            noise = torch.rand(4)
        seen.append(noise)
        return x * noise

    def go(run):
        seen.clear()
        checkpointing.model_parallel_cuda_manual_seed(5)
        x = torch.ones(4, requires_grad=True)
        run(run(x)).sum().backward()
        with tracker.fork():
            return x.grad, torch.rand(2)

    grad, after = go(noisy)
    first, second = seen
    got_grad, got_after = go(lambda x: checkpoint(noisy, x))
    assert len(seen) == 4 and torch.equal(seen[0], first) and torch.equal(seen[1], second)
    assert torch.equal(seen[2], second) and torch.equal(seen[3], first)
    assert torch.equal(grad, got_grad) and torch.equal(after, got_after)


def test_configure_by_arguments_and_by_config():
    assert not checkpointing.is_configured()
    checkpointing.configure(None, synchronize=True)
    assert checkpointing.is_configured() and configuration.options().synchronize
    config = {"activation_checkpointing": {"profile": True, "number_checkpoints": 4}}
    checkpointing.configure(None, deepspeed_config=config)
    assert configuration.options().profile and configuration.options().num_checkpoints == 4 and not configuration.options().synchronize
    checkpointing.configure(None, deepspeed_config=config, profile=False, num_checkpoints=5)
    assert not configuration.options().profile and configuration.options().num_checkpoints == 5
    loaded = types.SimpleNamespace(activation_checkpointing=types.SimpleNamespace(
        partition_activations=False, contiguous_memory_optimization=False, number_checkpoints=7, cpu_checkpointing=False,
        synchronize_checkpoint_boundary=False, profile=False))
    checkpointing.configure(None, loaded)
    assert configuration.options().num_checkpoints == 7
    checkpointing.set_num_layers(2)
    assert configuration.options().num_checkpoints == 2
    checkpointing.reset()


def test_synchronize_and_profile_say_what_took_how_long(monkeypatch):
    said = []
    monkeypatch.setattr(recompute, "log_dist", said.append)
    checkpointing.configure(None, synchronize=True, profile=True)
    block = Block()
    train(block, lambda x: checkpointing.checkpoint(block, x))
    assert [line.split(": ")[1].split(" took")[0] for line in said] == ["forward", "recomputation"]


def test_options_that_are_of_no_use_are_refused_and_change_nothing():
    two_ranks = types.SimpleNamespace(get_model_parallel_world_size=lambda: 2)
    for error, message, options in (
            (ValueError, "2 ranks but no group: it needs get_tensor_model_parallel_group", dict(mpu_=two_ranks, partition_activations=True)),
            (ValueError, "says it has 0 ranks", dict(mpu_=types.SimpleNamespace(get_model_parallel_world_size=lambda: 0),
                                                     partition_activations=True)),
            (ValueError, "needs partition_activations", dict(contiguous_checkpointing=True)),
            (ValueError, "needs num_checkpoints", dict(contiguous_checkpointing=True, partition_activations=True)),
            (TypeError, "partition_activations: expected True or False, got 'yes'", dict(partition_activations="yes")),
            (TypeError, "expected an integer, got 2.5", dict(num_checkpoints=2.5)),
            (TypeError, "expected an integer, got True", dict(num_checkpoints=True)),
            (ValueError, "must be at least 1, got 0", dict(num_checkpoints=0)),
            (ValueError, "activation_checkpointing.number_checkpoints", dict(deepspeed_config={
                "activation_checkpointing": {"number_checkpoints": 0}})),
            (ValueError, "nearest known key: activation_checkpointing.partition_activations", dict(deepspeed_config={"activation_checkpointing": {"partition_activation": True}}))):
        with pytest.raises(error, match=message):
            checkpointing.configure(**{"mpu_": None, **options})
    assert not checkpointing.is_configured() and configuration.options() == configuration.Options()
    with pytest.raises(ValueError, match="must be at least 1"):
        checkpointing.set_num_layers(0)
    checkpointing.configure(None, partition_activations=True)  # nothing to partition on one rank
    checkpointing.partition_activations_in_checkpoint(False)
    assert not configuration.options().partition_activations


def test_the_model_parallel_unit_stays_until_another_is_given():
    unit = types.SimpleNamespace(get_model_parallel_rank=lambda: 1)
    checkpointing.configure(unit)
    checkpointing.configure(None, profile=True)
    assert configuration.options().mpu is unit


def test_tracker():
    tracker = checkpointing.CudaRNGStatesTracker()
    tracker.add("a", 1)
    tracker.add("b", 2)
    for again, message in ((("c", 1), "seed 1 is in use"), (("a", 3), "'a' exists already")):
        with pytest.raises(RuntimeError, match=message):
            tracker.add(*again)
    with pytest.raises(RuntimeError, match="'z' is unknown"):
        with tracker.fork("z"):
            pass
    device = get_accelerator().current_device_name()
    usual = get_accelerator().get_rng_state()
    with tracker.fork("a"):
        first = torch.rand(2, device=device)
    states = tracker.get_states()
    with tracker.fork("a"):
        second = torch.rand(2, device=device)
    tracker.set_states(states)
    with tracker.fork("a"):
        assert torch.equal(second, torch.rand(2, device=device)) and not torch.equal(first, second)
    assert torch.equal(usual, get_accelerator().get_rng_state())
    tracker.reset()
    assert tracker.get_states() == {}


def test_model_parallel_seeds_differ_by_rank():
    draws = []
    for rank in (0, 1, 0):
        checkpointing.configure(types.SimpleNamespace(get_model_parallel_rank=lambda: rank))
        checkpointing.model_parallel_cuda_manual_seed(9)
        common = torch.rand(2)
        with checkpointing.get_cuda_rng_tracker().fork():
            draws.append(torch.rand(2))
        checkpointing.model_parallel_reconfigure_tp_seed(9)
        with checkpointing.get_cuda_rng_tracker().fork():
            assert torch.equal(torch.rand(2), draws[-1])
    assert torch.equal(draws[0], draws[2]) and not torch.equal(draws[0], draws[1]) and not torch.equal(common, draws[0])


def test_old_import_path_is_the_same_module():
    from deepspeed.runtime.activation_checkpointing import checkpointing as old

    assert old is checkpointing is deepspeed.checkpointing
    assert issubclass(checkpointing.CheckpointFunction, torch.autograd.Function)


@pytest.mark.parametrize("checkpoint", BOTH)
@pytest.mark.parametrize("partition", [False, True])
def test_under_torch_compile(checkpoint, partition):
    """One graph; where inputs are to move, pieces."""
    checkpointing.configure(None, partition_activations=partition)
    layers = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(2))

    def run(x):
        for layer in layers:
            x = checkpoint(layer, x)
        return x.square().sum()

    x = torch.arange(16.0).view(2, 8).requires_grad_()
    want = torch.autograd.grad(layers[1](layers[0](x)).square().sum(), layers.parameters())
    torch._dynamo.reset()
    torch.compile(run, backend="aot_eager", fullgraph=not partition)(x).backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(want, layers.parameters()))


def test_containers_with_gradients_are_taken_apart_and_others_are_handed_on():
    seen = []

    def function(x, pairs, untouched):
        seen.append(untouched)
        return {"sum": x * pairs["a"][0] + pairs["a"][1], "pair": (x, None)}

    for checkpoint in BOTH:
        a, b, x = (torch.full((3,), value, requires_grad=True) for value in (2.0, 3.0, 5.0))
        untouched = [torch.ones(1)]
        seen.clear()
        out = checkpoint(function, x, {"a": (a, b)}, untouched)
        (out["sum"] + out["pair"][0]).sum().backward()
        assert out["pair"][1] is None and all(value is untouched for value in seen)
        assert a.grad.tolist() == [5.0] * 3 and b.grad.tolist() == [1.0] * 3 and x.grad.tolist() == [3.0] * 3
        single, several = checkpoint(lambda t: (t * 2,), x), checkpoint(lambda t: [t, 3, t.detach() > 0], x)
        assert torch.is_tensor(single) and type(several) is tuple and several[1] == 3 and several[2].dtype is torch.bool


def test_the_function_class_fills_the_list_of_outputs():
    x, outputs = torch.ones(3, requires_grad=True), []
    got = checkpointing.CheckpointFunction.apply(lambda t, n: (t * n, "word"), outputs, x, 4)
    got.sum().backward()
    assert outputs[0] is got and outputs[1] == "word" and x.grad.tolist() == [4.0] * 3


def test_autocast_is_as_in_the_first_run():
    seen = []

    def function(x, weight):
        seen.append((x @ weight).dtype)
        return x @ weight

    for checkpoint in BOTH:
        x = torch.ones(2, 2, requires_grad=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = checkpoint(function, x, torch.ones(2, 2))
        y.sum().backward()
    assert seen == [torch.bfloat16] * 4


def test_gradients_keep_their_strides():
    """As without checkpointing, or what sums over them would add in another order; a leaf's .grad would have the leaf's."""
    for checkpoint in BOTH:
        strides, x = [], torch.ones(3, 4, requires_grad=True)
        y = x * 1
        y.register_hook(lambda gradient: strides.append(gradient.stride()))
        checkpoint(lambda t: t.mT.contiguous() * 2, y).sum().backward()
        want = []
        y = x * 1
        y.register_hook(lambda gradient: want.append(gradient.stride()))
        (y.mT.contiguous() * 2).sum().backward()
        assert strides == want
