# SPDX-License-Identifier: Apache-2.0
"""Ways of driving the engine that scripts really use, each against plain torch in one process."""
import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.parity.cases import CASES
from tests.parity.launch import on_ranks, run
from tests.parity.reference_loop import Reference, close, reference_loop
from tests.parity.training import (STAGES, assert_same_bits, config, engine_loop, full_parameters, of_all_ranks, start, train, transport)

CARRIERS = ("shm", "c10d")


def result(engine, losses, norms):
    got = Reference(of_all_ranks(torch.as_tensor(losses, dtype=torch.float64)), full_parameters(engine.module), norms)
    engine.destroy()
    return got


# A way is one update from its micro-batches: way(engine, batches) -> their losses. The engine's own accumulation steps are as many as
# the batches, except for the ways in ONE_STEP, which divide themselves.

def by_plain_backward(engine, batches):
    for batch in batches:
        loss = engine(*batch)
        loss.backward()
        engine.step()
        yield loss


def by_the_module(engine, batches):
    for batch in batches:
        yield stepped(engine, engine.module(*batch))


def stepped(engine, loss):
    engine.backward(loss)
    engine.step()
    return loss


def by_no_sync(engine, batches):
    for batch in batches[:-1]:
        with engine.no_sync():
            loss = engine(*batch)
            engine.backward(loss)
        engine.step()
        yield loss
    yield stepped(engine, engine(*batches[-1]))


def by_no_sync_throughout(engine, batches):
    """Not even the last micro-batch is outside: a hint, not an assertion."""
    for batch in batches:
        with engine.no_sync():
            loss = engine(*batch)
            engine.backward(loss)
        engine.step()
        yield loss


def by_one_backward_for_all(engine, batches):
    """Several forwards, then one backward of their sum."""
    many = [engine(*batch) for batch in batches]
    stepped(engine, sum(many) / len(batches))
    return many


def by_several_backwards(engine, batches):
    """All forwards first, then all backwards in the other order, one step."""
    many = [engine(*batch) for batch in batches]
    for loss in reversed(many):
        engine.backward(loss / len(batches))
    engine.step()
    return many


def by_coalescing(engine, batches):
    many = []
    with engine.coalesce_grad_reduction():
        for batch in batches:
            many.append(engine(*batch))
            engine.backward(many[-1] / len(batches))
    engine.step()
    return many


def with_evaluation_between(engine, batches):
    """Evaluation without gradients, in the midst of accumulation and between forward and backward."""
    for batch in batches:
        loss = engine(*batch)
        engine.eval()
        with torch.no_grad():
            again = engine(*batch)
        engine.train()
        assert again.item() == loss.item()
        yield stepped(engine, loss)


def driven(way, case, stage, steps, accumulation):
    engine = start(case.build(), config(stage, 1 if way in ONE_STEP else accumulation))
    losses, norms = [], []
    for step in range(steps):
        batches = [case.batch(step, micro, dist.get_rank()) for micro in range(accumulation)]
        losses.append([loss.item() for loss in way(engine, batches)])
        norms.append(engine.get_global_grad_norm())
    return result(engine, losses, norms)


ONE_STEP = (by_one_backward_for_all, by_several_backwards, by_coalescing)
WAYS = {f.__name__: f for f in (by_plain_backward, by_the_module, by_no_sync, by_no_sync_throughout, by_one_backward_for_all,
                                by_several_backwards, by_coalescing, with_evaluation_between)}
SEVERAL_GRAPHS = ("by_one_backward_for_all", "by_several_backwards")


def in_every_way(way, names, carriers, stages):
    results = {}
    for name in names:
        for stage in stages:
            for choice in carriers:
                with transport(choice):
                    got = driven(WAYS[way], CASES[name], stage, 4, 3)
                results.setdefault(name, got)
                if way != "by_no_sync" and way != "by_no_sync_throughout":  # there stages 0 and 1 add in another order
                    assert_same_bits(got, results[name], f"{way}: stage {stage} of {name} over {choice}")
                results[name, stage, choice] = got
    return results


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_driving_follows_plain_torch(way):
    # Branches that differ among ranks and steps need one forward for one backward where the carrier wants a fixed order.
    carriers = CARRIERS if way not in SEVERAL_GRAPHS else ("shm",)
    found = run(in_every_way, 2, way, ("tied", "unused", "routed"), carriers, STAGES, timeout=120)[0]
    for name in ("tied", "unused", "routed"):
        want = reference_loop(CASES[name], 2, 4, 3)
        for key, got in found.items():
            if key[0] == name and isinstance(key, tuple):
                close(got, want)


def client_adam(parameters):
    return torch.optim.Adam(parameters, lr=1e-3, weight_decay=0.01)


def client_adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1e-3, betas=(0.8, 0.95), eps=1e-7)


def client_sgd(parameters):
    return torch.optim.SGD(parameters, lr=1e-2, momentum=0.9, dampening=0.1, weight_decay=0.01)


def client_nesterov(parameters):
    return torch.optim.SGD(parameters, lr=1e-2, momentum=0.9, nesterov=True)


def client_adagrad(parameters):
    return torch.optim.Adagrad(parameters, lr=1e-2, weight_decay=0.01)


def client_rmsprop(parameters):
    return torch.optim.RMSprop(parameters, lr=1e-3, momentum=0.5)


def client_amsgrad(parameters):
    return torch.optim.AdamW(parameters, lr=1e-3, amsgrad=True)


CLIENTS = (client_adam, client_adamw, client_sgd, client_nesterov, client_adagrad, client_rmsprop, client_amsgrad)


def with_clients(name):
    found = []
    for optimizer in CLIENTS:
        per_stage = [train(CASES[name], stage, 5, 2, optimizer_of=optimizer, zero_allow_untested_optimizer=True) for stage in STAGES]
        for stage in STAGES[1:]:
            assert_same_bits(per_stage[stage], per_stage[0], f"stage {stage}, {optimizer.__name__}")
        found.append(per_stage[0])
    return found


@pytest.mark.parametrize("name", ["odd", "tied"])
def test_optimizers_of_torch_at_every_stage(name):
    for optimizer, got in zip(CLIENTS, run(with_clients, 2, name)[0]):
        close(got, reference_loop(CASES[name], 2, 5, 2, optimizer=optimizer))


def two_engines(names, stages, choice):
    with transport(choice):
        engines = [start(CASES[name].build(), config(stage)) for name, stage in zip(names, stages)]
    losses = [[], []]
    norms = [[], []]
    for step in range(4):
        pending = [engine(*CASES[name].batch(step, 0, dist.get_rank())) for engine, name in zip(engines, names)]
        for k in (1, 0):
            engines[k].backward(pending[k])
        for k, engine in enumerate(engines):
            engine.step()
            losses[k].append([pending[k].item()])
            norms[k].append(engine.get_global_grad_norm())
    return [result(engine, losses[k], norms[k]) for k, engine in enumerate(engines)]


@pytest.mark.parametrize("choice", CARRIERS)
def test_two_engines_alternate(choice):
    for names, stages in ((("tied", "odd"), (3, 3)), (("routed", "gpt"), (3, 1)), (("odd", "unused"), (2, 0))):
        for name, got in zip(names, run(two_engines, 2, names, stages, choice)[0]):
            close(got, reference_loop(CASES[name], 2, 4))


def batches_of(rank):
    return 5 - 3 * rank


class Silent(nn.Module):
    """What a rank without data computes: nothing. The reference adds zero gradients for it."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *inputs):
        return self.model(*inputs[:-1]) if inputs[-1] else 0.0 * sum(p.sum() for p in self.model.parameters())


class SilentBuild:
    def __init__(self, model):
        self.model = model

    def __call__(self):
        return Silent(self.model())


class SilentInputs:
    def __init__(self, inputs):
        self.inputs = inputs

    def __call__(self, generator, step, micro, rank):
        return (*self.inputs(generator, step, micro, rank), step < batches_of(rank))


def joined(name, stage, choice):
    case = CASES[name]
    with transport(choice):
        engine = start(case.build(), config(stage))
    losses = torch.zeros(5, 1, dtype=torch.float64)
    with engine.join():
        for step in range(batches_of(dist.get_rank())):
            loss = engine(*case.batch(step, 0, dist.get_rank()))
            engine.backward(loss)
            engine.step()
            losses[step] = loss.item()
    assert engine.global_steps == 5
    return result(engine, losses, [])


def joined_everywhere(name):
    first = None
    for stage in STAGES:
        for choice in CARRIERS:
            got = joined(name, stage, choice)
            first = first or got
            assert_same_bits(got, first, f"stage {stage} over {choice}")
    return first


@pytest.mark.parametrize("name", ["gpt", "tied"])
def test_join_with_different_numbers_of_batches(name):
    case = CASES[name]
    want = reference_loop(case._replace(model=SilentBuild(case.model), inputs=SilentInputs(case.inputs)), 2, 5)
    got = run(joined_everywhere, 2, name)[0]
    close(got, Reference(want.losses, {n.removeprefix("model."): p for n, p in want.parameters.items()}, []))


def wrapped_twice(name, stage):
    """As a trainer does that first prepares a reference model: stage 3 without an optimizer, then an engine that trains."""
    case = CASES[name]
    model = case.build()
    first = start(model, config(3, optimizer=None))
    with torch.no_grad():
        before = first(*case.batch(0, 0, dist.get_rank())).item()
    engine = start(model, config(stage))
    assert full_parameters(model).keys() == dict(case.build().named_parameters()).keys()
    losses, norms = engine_loop(engine, case, 4)
    assert losses[0, 0].item() == before
    return result(engine, losses, norms)


@pytest.mark.parametrize("name", ["tied", "odd"])
def test_a_module_is_wrapped_twice(name):
    want = reference_loop(CASES[name], 2, 4)
    for stage in (3, 1):
        close(run(wrapped_twice, 2, name, stage)[0], want)


def hybrid(name):
    whole = train(CASES[name], 3, 4, 2, gradient_clipping=0.5)
    for choice in CARRIERS:
        with transport(choice):
            cut = train(CASES[name], 3, 4, 2, gradient_clipping=0.5, zero={"zero_hpz_partition_size": 2})
        yield whole, cut


def hybrid_list(name):
    found = list(hybrid(name))
    assert_same_bits(found[1][1], found[0][1], "hybrid over Gloo")
    return found[0]


def test_hybrid_sharding_on_four_ranks():
    for name in ("tied", "unused"):
        want = reference_loop(CASES[name], 4, 4, 2, clip=0.5)
        results = run(hybrid_list, 4, name, timeout=120)
        for whole, cut in results:
            assert all(torch.equal(cut.parameters[n], p) for n, p in results[0][1].parameters.items()), "replicas differ"
        close(results[0][0], want)
        close(results[0][1], want)


@on_ranks(2)
def test_parameters_keep_their_shape_and_say_where_they_are():
    engine = start(CASES["zero_dim"].build(), config(3))
    shapes = {name: p.shape for name, p in CASES["zero_dim"].build().named_parameters()}
    assert {name: p.shape for name, p in engine.module.named_parameters()} == shapes
    with pytest.raises(RuntimeError, match="first.weight"):
        engine.module.first.weight.sum()
    engine.destroy()
