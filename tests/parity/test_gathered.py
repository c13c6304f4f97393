# SPDX-License-Identifier: Apache-2.0
"""GatheredParameters, the ds_* surface of parameters, external parameters, leaf modules and hooks: what callers do to a sharded model."""
import copy
import gc

import pytest
import torch
import torch.distributed as dist
from torch import nn

import deepspeed
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus, register_external_parameter
from deepspeed.zero import GatheredParameters
from tests.parity.launch import on_ranks
from tests.parity.tiny import assert_same, batch, config, engine_of, tiny, train, whole


_engines = []


def sharded(**more):
    """An engine that lives on when a test keeps its module only."""
    _engines.append(engine_of(tiny(), config(3, **more)))
    del _engines[:-2]
    return _engines[-1]


def freed(model):
    return all(p.ds_status == ZeroParamStatus.NOT_AVAILABLE and p.data.numel() == 0 for p in model.parameters())


def values(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


# ------------------------------------------------------------------------------------------------------------- what it accepts


@on_ranks(2)
def test_whatever_callers_pass():
    model = sharded().module
    expected = values(tiny())
    weight = model.head.weight
    for params in (weight, [weight], (weight, weight), {weight}, model.parameters(), [None, weight, model.seen, torch.zeros(2)],
                   [[weight], None], iter([weight]), dict(w=weight).values()):
        with GatheredParameters(params):
            assert weight.ds_status == ZeroParamStatus.AVAILABLE
            assert torch.equal(weight, expected["head.weight"]) and weight.size() == weight.ds_shape
        assert freed(model)


@on_ranks(2)
def test_without_sharded_parameters_it_is_nothing():
    plain = nn.Linear(3, 3)
    for params in (None, [], [None], plain.weight, plain.parameters(), [torch.zeros(2)]):
        if dist.get_rank() == 0:  # no collective: one rank alone gets through
            with GatheredParameters(params, modifier_rank=0):
                plain.weight.data.fill_(1.0)
    engine = sharded()
    with GatheredParameters(engine.module.parameters(), enabled=False):
        assert freed(engine.module)


@on_ranks(2)
def test_on_one_rank_when_whole_already():
    model = sharded().module
    params = list(model.parameters())
    with GatheredParameters(params, modifier_rank=0):
        if dist.get_rank() == 0:
            with GatheredParameters(model.head.weight, modifier_rank=None):
                model.head.weight.data.fill_(0.5)
            assert model.head.weight.ds_status == ZeroParamStatus.AVAILABLE
    assert freed(model)
    assert (whole(model)["head.weight"] == 0.5).all()


@on_ranks(2)
@pytest.mark.parametrize("inner", [None, 0])
def test_nested_on_overlapping_parameters(inner):
    model = sharded().module
    with GatheredParameters(list(model.parameters()), modifier_rank=0):
        with GatheredParameters(model.layers[1].parameters(), modifier_rank=inner):
            model.layers[1].linear.weight.data.fill_(2.0 + dist.get_rank())
        assert model.layers[1].linear.weight.sum() > 0
        with GatheredParameters([model.head.bias, model.layers[1].linear.bias]):
            pass
        assert model.head.bias.ds_status == ZeroParamStatus.AVAILABLE
    assert freed(model)
    assert (whole(model)["layers.1.linear.weight"] == 2.0).all()


# -------------------------------------------------------------------------------------------------------------------- changing


@on_ranks(2)
@pytest.mark.parametrize("rank", [0, 1])
def test_the_modifier_counts(rank):
    engine = sharded()
    model = engine.module
    before = values(tiny())
    with GatheredParameters([model.head.weight], modifier_rank=rank), torch.no_grad():
        model.head.weight.fill_(1.0 + dist.get_rank())
    after = whole(model)
    assert (after.pop("head.weight") == 1.0 + rank).all()
    before.pop("head.weight")
    assert_same(after, before)
    assert (deepspeed.utils.safe_get_full_fp32_param(model.head.weight) == 1.0 + rank).all()


@on_ranks(2)
def test_the_modifier_counts_in_bf16_masters():
    engine = sharded(bf16={"enabled": True})
    with GatheredParameters([engine.module.head.weight], modifier_rank=0), torch.no_grad():
        engine.module.head.weight.fill_(3.0)
    assert (deepspeed.utils.safe_get_full_fp32_param(engine.module.head.weight) == 3.0).all()


@on_ranks(2)
def test_without_a_modifier_changes_are_forgotten():
    model = sharded().module
    before = whole(model)
    with GatheredParameters(model.parameters()), torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
        assert torch.equal(model.head.weight, before["head.weight"] + 1.0)
    assert_same(whole(model), before)


@on_ranks(2)
def test_assigning_data_inside():
    model = sharded().module
    with GatheredParameters(model.head.parameters(), modifier_rank=0):
        model.head.weight.data = torch.full((1, 9), 4.0)
    assert freed(model)
    with GatheredParameters(model.head.parameters()):
        model.head.bias.data = torch.full((1,), 9.0)
    after = whole(model)
    assert (after["head.weight"] == 4.0).all() and torch.equal(after["head.bias"], values(tiny())["head.bias"])


@on_ranks(2)
def test_data_of_another_shape_inside():
    model = sharded().module
    with pytest.raises(RuntimeError, match=r"head\.weight.*shape|shape.*head\.weight"):
        with GatheredParameters(model.head.parameters(), modifier_rank=0):
            model.head.weight.data = torch.zeros(2, 9)


@on_ranks(2)
def test_reassigning_the_parameter_inside():
    """As callers do who resize embeddings: the module gets a parameter of its own, the old one is cut again."""
    model = sharded().module
    old = model.head.weight
    with GatheredParameters([old], modifier_rank=0):
        model.head.weight = nn.Parameter(torch.cat([old.data, torch.zeros(2, 9)]))
    assert old.ds_status == ZeroParamStatus.NOT_AVAILABLE
    assert model.head.weight.shape == (3, 9) and not hasattr(model.head.weight, "ds_id")


@on_ranks(2)
@pytest.mark.parametrize("modifier", [None, 0])
def test_an_exception_inside(modifier):
    model = sharded().module
    before = whole(model)
    with pytest.raises(KeyError, match="inside"):
        with GatheredParameters(model.parameters(), modifier_rank=modifier):
            raise KeyError("inside")
    assert freed(model)
    assert_same(whole(model), before)


@on_ranks(2)
def test_what_is_taken_out_stays_readable():
    engine = sharded()
    model = engine.module
    with GatheredParameters(model.parameters()):
        state = {name: p.detach().cpu() for name, p in model.named_parameters()}
        row = model.layers[0].linear.weight[0]
    expected = values(tiny())
    train(engine, 2)  # the memory has been gathered into again
    assert_same(state, expected)
    assert torch.equal(row, expected["layers.0.linear.weight"][0])


@on_ranks(2)
def test_between_forward_and_backward():
    engine, other = sharded(), sharded()
    for step in range(2):
        loss = engine(batch(step))
        with GatheredParameters(engine.module.parameters()):
            assert engine.module.head.weight.numel() == 9
        engine.backward(loss)
        engine.step()
    train(other, 2)
    assert_same(whole(engine.module), whole(other.module))


@on_ranks(2)
def test_forward_inside():
    engine, other = sharded(), sharded()
    with GatheredParameters(engine.module.parameters()):
        loss = engine(batch(0))
    engine.backward(loss)
    engine.step()
    train(other, 1)
    assert_same(whole(engine.module), whole(other.module))


# --------------------------------------------------------------------------------------------------------- attributes, methods


@on_ranks(2)
def test_attributes():
    model = sharded().module
    ids = [p.ds_id for p in model.parameters()]
    assert len(set(ids)) == len(ids) and all(isinstance(i, int) for i in ids)
    for p, q in zip(model.parameters(), tiny().parameters()):
        assert p.ds_shape == q.shape and p.ds_numel == q.numel() and p.shape == q.shape
        assert p.ds_tensor.dim() == 1 and p.ds_tensor.ds_numel == p.partition_numel() == p.ds_tensor.numel()
        assert p.ds_persist is False and p.ds_secondary_tensor is None
        p.ds_active_sub_modules.clear()
        assert p.ds_summary()["ds_shape"] == tuple(q.shape)
        assert "layers" in repr(p) or "head" in repr(p)
    total = torch.tensor(sum(p.ds_tensor.numel() for p in model.parameters()))
    dist.all_reduce(total)
    assert total == sum(p.numel() for p in tiny().parameters())


@on_ranks(2)
def test_all_gather_and_partition():
    model = sharded().module
    weight, bias = model.head.weight, model.head.bias
    weight.all_gather()
    assert weight.ds_status == ZeroParamStatus.AVAILABLE and torch.equal(weight, tiny().head.weight)
    weight.partition()
    assert weight.ds_status == ZeroParamStatus.NOT_AVAILABLE
    weight.all_gather(param_list=[weight, bias])
    with torch.no_grad():
        weight.fill_(2.0)
    weight.partition(param_list=[weight, bias], has_been_updated=True)
    dist.barrier()
    assert freed(model) and (whole(model)["head.weight"] == 2.0).all()


# ------------------------------------------------------------------------------------------------- weights used somewhere else


class Borrowing(nn.Module):
    """The head multiplies by the embedding's weight, which it does not own."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 9)
        self.body = nn.ModuleList(nn.Linear(9, 9) for _ in range(3))
        self.head = BorrowingHead()

    def forward(self, tokens):
        x = self.embed(tokens)
        for layer in self.body:
            x = torch.tanh(layer(x))
        return self.head(x, self.embed).square().mean()


class BorrowingHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(11))

    def forward(self, x, embed):
        return x @ embed.weight.t() * self.scale


def borrowing():
    torch.manual_seed(1)
    return Borrowing()


def train_borrowing(engine):
    for step in range(3):
        tokens = torch.randint(0, 11, (2, 3), generator=torch.Generator().manual_seed(10 * step + dist.get_rank()))
        loss = engine(tokens)
        engine.backward(loss)
        engine.step()
    return whole(engine.module)


@on_ranks(2)
@pytest.mark.parametrize("when", ["never", "before", "after"])
def test_a_weight_used_by_another_module(when):
    expected = train_borrowing(engine_of(borrowing(), config(0)))
    model = borrowing()
    if when == "before":
        register_external_parameter(model.head, model.embed.weight)
        register_external_parameter(model.head, model.embed.weight)
    engine = engine_of(model, config(3))
    if when == "after":
        register_external_parameter(model.head, model.embed.weight)
    assert_same(train_borrowing(engine), expected)
    assert freed(model)
    if when != "never":
        assert any(p is model.embed.weight for _, p in dict(named_externals(model)).items()) or model.head._ds_external_parameters


def named_externals(model):
    return list(model.ds_external_parameters())


@on_ranks(2)
def test_external_parameters_are_parameters():
    with pytest.raises(RuntimeError, match="torch.nn.Parameter"):
        register_external_parameter(nn.Linear(2, 2), torch.zeros(2))
    module, parameter = nn.Linear(2, 2), nn.Parameter(torch.zeros(2))
    from deepspeed.runtime.zero.partition_parameters import unregister_external_parameter
    with pytest.raises(RuntimeError, match="not registered"):
        unregister_external_parameter(module, parameter)
    register_external_parameter(module, parameter)
    unregister_external_parameter(module, parameter)


class Choosing(nn.Module):
    """Two branches; each rank takes its own."""

    def __init__(self):
        super().__init__()
        self.inward, self.branches = nn.Linear(9, 9), nn.ModuleList(nn.Linear(9, 9) for _ in range(2))

    def forward(self, x):
        return self.branches[dist.get_rank()](torch.tanh(self.inward(x)))


class Leafy(nn.Module):
    def __init__(self):
        super().__init__()
        self.choosing = nn.ModuleList(Choosing() for _ in range(2))

    def forward(self, x):
        for module in self.choosing:
            x = module(x)
        return x.square().mean()


@on_ranks(2)
def test_leaf_modules():
    torch.manual_seed(2)
    model = Leafy()
    assert len(deepspeed.utils.set_z3_leaf_modules(model, [Choosing])) == 2
    plain = copy.deepcopy(model)
    deepspeed.utils.unset_z3_leaf_modules(plain, [Choosing])
    engine, other = engine_of(model, config(3)), engine_of(plain, config(0))
    assert all(deepspeed.utils.z3_leaf_module(m) for m in model.choosing)
    train(engine), train(other)
    assert_same(whole(engine.module), whole(other.module))


# ------------------------------------------------------------------------------------------------------- hooks, generation


def strip_hooks(engine):
    """As TRL does before it generates."""
    off = engine.optimizer.parameter_offload if hasattr(engine.optimizer, "parameter_offload") else engine.optimizer
    for p in [*engine.module.parameters(recurse=True), *(p for _, p in engine.module.ds_external_parameters())]:
        p.ds_active_sub_modules.clear()
    for hook in off.forward_hooks:
        hook.remove()
    for hook in off.backward_hooks:
        hook.remove()
    off.forward_hooks = []
    off.backward_hooks = []
    return off


@on_ranks(2)
@pytest.mark.parametrize("optimizer", [True, False])
def test_hooks_come_off_and_back(optimizer):
    engine = engine_of(tiny(), config(3) if optimizer else config(3, optimizer=None))
    before = engine(batch(0)).item()
    with GatheredParameters(engine.module.parameters()):
        off = strip_hooks(engine)
        assert off.module is engine.module and not off.param_coordinator.is_invalid_trace()
        off.param_coordinator._invalidate_trace()
        with torch.no_grad():
            assert engine.module(batch(0)).item() == before
        off._register_deepspeed_module(off.module)
        assert off.forward_hooks
    assert freed(engine.module)
    assert engine(batch(0)).item() == before
    if optimizer:
        other = sharded()
        for e in (engine, other):
            e.zero_grad()
        assert train(engine) == train(other)


@on_ranks(2)
def test_unwrap_model_for_generation():
    engine = sharded()
    with deepspeed.zero.unwrap_model_for_generation(engine) as module, torch.no_grad():
        assert module is engine.module
        for step in range(3 + dist.get_rank()):  # ranks may generate different lengths: nothing is collective now
            module(batch(step))
    assert freed(engine.module)
    assert train(engine) == train(sharded())


@on_ranks(2)
def test_the_module_may_be_called_directly():
    engine, plain = sharded(), tiny()
    with torch.no_grad():
        assert torch.equal(engine.module.body(batch(0)), plain.body(batch(0)))
        assert torch.equal(engine.module.layers[1](batch(0)), plain.layers[1](batch(0)))
        assert torch.equal(engine.module.head(batch(0)), plain.head(batch(0)))
    assert freed(engine.module)


@on_ranks(2)
def test_a_module_attached_later_is_tolerated():
    engine = sharded()
    engine.module.extra = nn.Linear(1, 1)
    assert engine.module.extra(engine.module.body(batch(0))).shape == (2, 1)
    train(engine, 1)


@on_ranks(2)
@pytest.mark.parametrize("end", ["destroy", "drop", "drop in a cycle"])
def test_the_next_engine_takes_over_what_the_last_one_left(end):
    model = tiny()
    first = engine_of(model, config(3))
    losses = train(first)
    wanted = whole(model)
    if end == "destroy":
        first.destroy()
    if end == "drop in a cycle":
        holder = [first]
        holder.append(holder)
        del holder
    del first
    gc.collect()
    for name, parameter in model.named_parameters():
        assert parameter.ds_status == ZeroParamStatus.NOT_AVAILABLE, name
    assert_same(whole(model), wanted)
    second = engine_of(model, config(3))
    assert_same(whole(model), wanted)
    assert train(second)[0] < losses[0]


@on_ranks(2)
def test_parameters_come_in_any_order():
    """A caller's set has another order on every rank."""
    model = sharded().module
    wanted = {name: value for name, value in whole(model).items()}
    parameters = list(model.parameters())
    with GatheredParameters(parameters if dist.get_rank() == 0 else parameters[::-1], modifier_rank=0):
        if dist.get_rank() == 0:
            for parameter in parameters:
                parameter.data.add_(1)
    assert_same({name: value + 1 for name, value in wanted.items()}, whole(model))
