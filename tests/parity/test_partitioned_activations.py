# SPDX-License-Identifier: Apache-2.0
"""Saved inputs split over model parallel ranks: the bits of a run without checkpointing, and the bytes of a part."""
import types
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from deepspeed import checkpointing
from deepspeed.checkpointing import configuration
from deepspeed.device.host_memory import trim_heap
from tests.parity.launch import on_ranks, run
from tests.parity.reference_loop import Reference
from tests.parity.test_checkpointing import case_of
from tests.parity.training import assert_same_bits, config, engine_loop, full_parameters, start

WIDTH = 7


def units():
    """The world as model parallel ranks, in every form a caller may bring."""
    world, rank = dist.get_world_size(), dist.get_rank()
    named = dict(get_model_parallel_world_size=lambda: world, get_model_parallel_rank=lambda: rank,
                 get_model_parallel_group=lambda: dist.group.WORLD)
    return {"megatron": types.SimpleNamespace(**named),
            "megatron core": types.SimpleNamespace(**{key.replace("get_", "get_tensor_"): value for key, value in named.items()}),
            "mesh": init_device_mesh("cpu", (world,)),
            "named mesh": init_device_mesh("cpu", (1, world), mesh_dim_names=("data", "tp"))}


def configure(**options):
    """What one test leaves behind is not there for the next."""
    configuration.state().accept(configuration.Options(), configured=False)
    checkpointing.configure(options.pop("mpu", None) or units()["megatron"], **options)


class Layer(nn.Module):
    """Takes what layers take: a strange layout, masks, positions, a table without gradient, pairs with one, numbers, words, None."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x, mask, positions, table, pair, scale, mode, nothing=None, extra=None):
        assert mode == "word" and nothing is None
        y = self.linear(x.transpose(0, 1)).transpose(0, 1) * scale + table[positions]
        y = y.masked_fill(mask, 0.0) + pair[0] * pair[1]["b"]
        y = nn.functional.dropout(torch.tanh(y), 0.3)
        with checkpointing.get_cuda_rng_tracker().fork():
            noise = torch.rand(3, 5, 1)  # different on each rank; what is computed apart is summed, as in a tensor-parallel layer
        dist.all_reduce(noise)
        y = y * noise
        return (y.transpose(0, 1).contiguous().transpose(0, 1) if extra is None else y + extra.sum()), pair[0], "word", positions


def plainly(function, *args, **kwargs):
    return function(*args, **kwargs)


def reentrant(function, *args, **kwargs):
    return checkpointing.checkpoint(function, *args, **kwargs)


def non_reentrant(function, *args, **kwargs):
    return checkpointing.non_reentrant_checkpoint(function, *args, **kwargs)


def nested(function, *args, **kwargs):
    """A checkpoint in a checkpoint, of the other kind inside."""
    def inner(*args, **kwargs):
        return checkpointing.non_reentrant_checkpoint(function, *args, **kwargs)
    return checkpointing.checkpoint(inner, *args, **kwargs)


def nested_reentrant(function, *args, **kwargs):
    def inner(*args, **kwargs):
        return checkpointing.checkpoint(function, *args, **kwargs)
    return checkpointing.non_reentrant_checkpoint(inner, *args, **kwargs)


WAYS = (plainly, reentrant, non_reentrant, nested, nested_reentrant)


def train(way, numel_of_extra=5, change=False, passes=2):
    """Gradients of everything, and the random numbers after it."""
    torch.manual_seed(4)
    checkpointing.model_parallel_cuda_manual_seed(7)
    layers = nn.ModuleList(Layer() for _ in range(3))
    x = torch.randn(5, 3, WIDTH).transpose(0, 1).requires_grad_()
    left = torch.randn(3, 5, 1, requires_grad=True)
    right = torch.randn(1, 1, WIDTH, requires_grad=True)
    extra = torch.randn(numel_of_extra, requires_grad=True)
    mask, positions, table = torch.rand(3, 5, WIDTH) < 0.2, torch.randint(0, 4, (3, 5)), torch.randn(4, WIDTH)
    results = []
    for _ in range(passes):
        y, carried, between = x * 1.0, left.expand(3, 5, WIDTH)[..., ::2] * 2, []
        carried = carried.repeat_interleave(2, -1)[..., :WIDTH]
        for number, layer in enumerate(layers):
            between.append(y)
            y, carried, word, same = way(layer, y, mask, positions, table, (carried, {"b": right * 1.0}), 1.5, "word",
                                         extra=extra * 1.0 if number == 1 else None)
            assert word == "word" and torch.equal(same, positions)
        loss = (y * carried).sum()
        if change:
            with torch.no_grad():
                for tensor in between:
                    tensor.zero_()
        loss.backward()
        results += [loss.detach()]
    with checkpointing.get_cuda_rng_tracker().fork():
        results.append(torch.rand(3))
    return [*results, torch.rand(3), *(t.grad for t in (x, left, right, extra)), *(p.grad for p in layers.parameters())]


def same_bits(got, want):
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def bits_of_every_way():
    found = units()
    configure(mpu=found["megatron"])
    want = {size: train(plainly, size) for size in (1, 5, 16)}  # below, beside and above the number of ranks
    for size in want:
        configure(mpu=found["megatron"], partition_activations=True)
        for way in WAYS[1:]:
            same_bits(train(way, size), want[size])
    for options in (dict(contiguous_checkpointing=True, num_checkpoints=3), dict(checkpoint_in_cpu=True)):
        configure(mpu=found["megatron"], partition_activations=True, **options)
        for way in WAYS[1:]:
            same_bits(train(way), want[5])
    for form in ("megatron core", "mesh", "named mesh"):
        configure(mpu=found[form], partition_activations=True)
        same_bits(train(reentrant), want[5])


@pytest.mark.parametrize("ranks", [2, 3])
def test_no_bit_changes(ranks):
    run(bits_of_every_way, ranks, timeout=120)


@on_ranks(2)
def test_the_caller_may_change_what_was_split():
    configure(partition_activations=True)
    want = train(plainly)
    for way in (reentrant, non_reentrant):
        same_bits(train(way, change=True), want)
    configure(partition_activations=False)
    for way in (reentrant, non_reentrant):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            train(way, change=True)


class Saved:
    """Bytes that autograd saves while this is active, each storage once."""

    def __enter__(self):
        self.seen = {}
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda tensor: tensor)
        self.hooks.__enter__()
        return self

    def pack(self, tensor):
        self.seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    def __exit__(self, *error):
        self.hooks.__exit__(*error)

    @property
    def nbytes(self):
        return sum(self.seen.values())


def resident_bytes():
    trim_heap()
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.by = nn.Parameter(torch.tensor(1.01))

    def forward(self, x):
        return x * self.by + 1


def forward_of_layers(way, numel, layers=3):
    model = [Scale() for _ in range(layers)]
    y = torch.full((numel,), 0.5, requires_grad=True) * 2
    before = resident_bytes()
    with Saved() as saved:
        for layer in model:
            y = way(layer, y)
    held = resident_bytes() - before
    y.sum().backward()
    return saved.nbytes, held, [layer.by.grad for layer in model]


def bytes_of_a_part(way, contiguous):
    mib, layers, ranks = 1 << 20, 3, dist.get_world_size()
    numel = 3 * mib + 1  # not divided by 2 or 3 ranks
    configure(partition_activations=False)
    forward_of_layers(way, numel)  # the first pass also pages in code
    whole_saved, whole_held, want = forward_of_layers(way, numel)
    configure(partition_activations=True, **(dict(contiguous_checkpointing=True, num_checkpoints=layers) if contiguous else {}))
    for passes in range(4):
        saved, held, got = forward_of_layers(way, numel)
        same_bits(got, want)
        part = -(-numel // ranks) * 4
        assert layers * numel * 4 <= whole_saved <= layers * (numel * 4 + 64)
        assert layers * part <= saved <= layers * (part + 64), (saved, part)
        if passes == 3 and not contiguous:  # nothing is compared any more: a thread of the backend may still hold what it sent last
            assert whole_held - held > (layers * 4 * numel - layers * part) * 0.9, (whole_held / mib, held / mib)
    if contiguous:
        assert configuration.state().slots.nbytes == layers * part  # the second pass took the same memory
        checkpointing.reset()
        assert configuration.state().slots.nbytes == 0


@pytest.mark.parametrize("contiguous", [False, True])
@pytest.mark.parametrize("way", [reentrant, non_reentrant])
@pytest.mark.parametrize("ranks", [2, 3])
def test_a_rank_holds_its_part(ranks, way, contiguous):
    run(bytes_of_a_part, ranks, way, contiguous)


@on_ranks(2)
def test_inputs_that_differ_are_refused_on_both_ranks():
    for way in (reentrant, non_reentrant):
        configure(partition_activations=True)
        x = torch.ones(5, requires_grad=True) + 0
        way(torch.tanh, x)
        y = x + dist.get_rank()
        with pytest.raises(ValueError, match=r"argument 0 of tanh \[5\] is not the same on all model parallel ranks.*Turn partition_act"):
            way(torch.tanh, y)
        with pytest.raises(ValueError, match="has 6 elements on one model parallel rank and 7 on another, here"):
            way(torch.tanh, torch.ones(6 + dist.get_rank(), requires_grad=True) + 0)
        nan = torch.full((5,), float("nan"), requires_grad=True) + 0
        way(torch.tanh, nan)


@on_ranks(2)
def test_a_group_that_does_not_fit_is_refused():
    mpu = types.SimpleNamespace(get_model_parallel_world_size=lambda: 3, get_model_parallel_group=lambda: dist.group.WORLD)
    configure(mpu=mpu, partition_activations=True)
    with pytest.raises(ValueError, match="says it has 3 ranks, its group has 2"):
        checkpointing.checkpoint(torch.tanh, torch.ones(4, requires_grad=True))
    with pytest.raises(ValueError, match=r"device mesh with the dimensions \('a', 'b'\): none is called tensor_parallel"):
        configure(mpu=init_device_mesh("cpu", (1, 2), mesh_dim_names=("a", "b")), partition_activations=True)


@on_ranks(2)
def test_only_activations_are_split():
    configure(partition_activations=True)
    parameter, one = nn.Parameter(torch.ones(8)), torch.ones(1, requires_grad=True) * 3
    mask, table, x = torch.ones(8, dtype=torch.bool), torch.ones(8), torch.ones(8, requires_grad=True) * 2
    overlapping = (torch.ones(9, requires_grad=True) * 1).unfold(0, 4, 2)
    with Saved() as saved:
        out = reentrant(lambda *values: sum(value.sum() for value in values), parameter, one, mask, table, x, overlapping)
    storages = {value.untyped_storage().data_ptr() for value in (parameter, one, mask, table, overlapping)}
    assert storages <= set(saved.seen) and x.untyped_storage().data_ptr() not in saved.seen and len(saved.seen) == 6
    out.backward()
    assert torch.equal(parameter.grad, torch.ones(8))


@on_ranks(2)
def test_a_second_backward_and_gradients_by_grad():
    configure(partition_activations=True, contiguous_checkpointing=True, num_checkpoints=1)
    for way in (reentrant, non_reentrant):
        x = torch.ones(5, requires_grad=True)
        y = way(torch.square, x * 3)
        y.sum().backward(retain_graph=True)
        y.sum().backward()
        assert torch.equal(x.grad, torch.full((5,), 36.0))
    x = torch.ones(5, requires_grad=True)
    assert torch.equal(torch.autograd.grad(non_reentrant(torch.square, x * 3).sum(), x)[0], torch.full((5,), 18.0))
    with pytest.raises(RuntimeError, match="use deepspeed.checkpointing.non_reentrant_checkpoint there"):
        torch.autograd.grad(reentrant(torch.square, x * 3).sum(), x)


@on_ranks(2)
def test_without_gradients_nothing_is_sent():
    configure(partition_activations=True)
    if dist.get_rank() == 0:  # the other rank would be waited for
        with torch.no_grad():
            for way in (reentrant, non_reentrant):
                assert way(torch.tanh, torch.ones(5, requires_grad=True)).requires_grad is False
        with pytest.warns(UserWarning, match="no argument requires a gradient"):
            assert not reentrant(torch.tanh, torch.ones(5)).requires_grad
    dist.barrier()


class SameOnAllModelParallelRanks(NamedTuple):
    """Inputs of a case by the data-parallel rank, as ranks of one model see them."""
    inputs: object
    model_ranks: int

    def __call__(self, generator, step, micro, rank):
        generator = torch.Generator().manual_seed((step * 97 + micro) * 97 + rank // self.model_ranks)
        return self.inputs(generator, step, micro, rank)


def two_by_two():
    """Ranks (0, 1) and (2, 3) share a model, (0, 2) and (1, 3) the data."""
    rank = dist.get_rank()
    model = [dist.new_group([0, 1]), dist.new_group([2, 3])][rank // 2]
    data = [dist.new_group([0, 2]), dist.new_group([1, 3])][rank % 2]
    return types.SimpleNamespace(
        get_model_parallel_world_size=lambda: 2, get_model_parallel_rank=lambda: rank % 2, get_model_parallel_group=lambda: model,
        get_data_parallel_world_size=lambda: 2, get_data_parallel_rank=lambda: rank // 2, get_data_parallel_group=lambda: data)


def under_engines(stages, ways):
    """Gathering of parameters and of saved inputs in the same backward."""
    mpu = two_by_two() if dist.get_world_size() == 4 else None
    options = {"options_of_engine": {"mpu": mpu}} if mpu else {}
    for mix in ((False, "none", True), (True, "first", False)):
        def case(way):
            made = case_of(way, *mix)
            return made._replace(inputs=SameOnAllModelParallelRanks(made.inputs, 2))
        configure(mpu=mpu, partition_activations=False)
        plain = train_with_engine(case("plainly"), 0, 3, **options)
        for stage in stages:
            for way in ways:
                configure(mpu=mpu, partition_activations=True, contiguous_checkpointing=stage == 3, num_checkpoints=6)
                assert_same_bits(train_with_engine(case(way), stage, 3, **options), plain, f"stage {stage}, {way}, {mix}")


def train_with_engine(case, stage, steps, options_of_engine=None):
    engine = start(case.build(), config(stage, 2), **(options_of_engine or {}))
    losses, norms = engine_loop(engine, case, steps, 2)
    parameters = full_parameters(engine.module)
    engine.destroy()
    return Reference(losses, parameters, norms)


def test_engines_of_every_stage():
    run(under_engines, 2, (1, 2, 3), ("own", "own_non_reentrant"))


def test_two_models_of_two_ranks():
    run(under_engines, 4, (3,), ("own",), timeout=120)
