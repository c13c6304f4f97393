# SPDX-License-Identifier: Apache-2.0
"""Graphs that reach weights by ways no module's outputs lead to, conversions, memory formats, pickles: each against plain torch."""
import io

import pytest
import torch
from torch import nn

from tests.parity.launch import on_ranks, run
from tests.parity.training import config, full_parameters, start

WIDTH = 48


class Scale(nn.Module):
    """Elementwise use of a weight: its backward reads the weight's memory directly."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.linspace(0.5, 1.5, WIDTH))
        self.b = nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x):
        return x * self.w * self.w + self.b


class Net(nn.Module):
    def __init__(self, inner=Scale):
        super().__init__()
        self.first, self.linear, self.last = inner(), nn.Linear(WIDTH, WIDTH), inner()

    def forward(self, x):
        return self.last(torch.tanh(self.linear(self.first(x)))).pow(2).mean()


class Keeper(Scale):
    """Keeps an auxiliary loss as an attribute."""
    aux = None

    def forward(self, x):
        self.aux = (self.w * self.w * self.w).sum()
        return super().forward(x)


class Cached(Scale):
    """Puts what it computes on the way into a container it was given, as attention does with keys and values."""

    def forward(self, x, cache):
        key = x * self.w
        cache.setdefault("keys", []).append(key)
        return torch.tanh(key) * self.w + self.b


class WithCache(Net):
    def __init__(self):
        super().__init__(Cached)

    def forward(self, x):
        cache = {}
        return self.last(torch.tanh(self.linear(self.first(x, cache))), cache).pow(2).mean()


class Boxed(Net):
    """Returns an object of a class of its own."""

    class Box:
        pass

    def forward(self, x):
        box = Boxed.Box()
        box.inner = Boxed.Box()
        box.inner.loss = super().forward(x)
        return box


def penalised(model, x):
    x = x.clone().requires_grad_(True)
    y = model(x)
    gradient, = torch.autograd.grad(y, x, create_graph=True)
    return y + gradient.pow(2).sum()


def penalised_then_forward(model, x):
    loss = penalised(model, x)
    return loss + model(x * 2)


def with_aux(model, x):
    return model(x) + 0.1 * (model.first.aux + model.last.aux)


WAYS = {
    "gradient penalty": (Net, penalised),
    "gradient penalty, then another forward": (Net, penalised_then_forward),
    "auxiliary loss kept by a module": (lambda: Net(Keeper), with_aux),
    "tensors put among the arguments": (WithCache, lambda model, x: model(x)),
    "output of a plain class": (Boxed, lambda model, x: model(x).inner.loss),
}


def batch(step):
    return torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(step))


def trained_plainly(build, loss_of, steps):
    torch.manual_seed(0)
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(model, batch(step)).backward()
        optimizer.step()
    return dict(model.named_parameters())


def assert_close(got, want):
    for name, value in want.items():
        torch.testing.assert_close(got[name], value.detach(), rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


def check_way(name, stage, plain_backward):
    build, loss_of = WAYS[name]
    torch.manual_seed(0)
    engine = start(build(), config(stage, optimizer=None) | {"optimizer": {"type": "SGD", "params": {"lr": 0.05}}})
    for step in range(3):
        loss = loss_of(engine, batch(step))
        loss.backward() if plain_backward else engine.backward(loss)
        engine.step()
    assert_close(full_parameters(engine.module), trained_plainly(build, loss_of, 3))
    engine.destroy()


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("name", WAYS)
def test_graphs_beside_the_modules(name, stage):
    for plain_backward in (False, True):
        run(check_way, 2, name, stage, plain_backward)


def check_units_are_freed_again():
    torch.manual_seed(0)
    engine = start(Net(), config(3))
    for step in range(2):
        engine.backward(penalised(engine, batch(step)))
    assert all(p.ds_status.name == "NOT_AVAILABLE" for p in engine.module.parameters())
    engine.step()
    engine.destroy()


def test_create_graph_does_not_keep_weights_for_ever():
    run(check_units_are_freed_again, 2)


def check_conversions(stage):
    torch.manual_seed(0)
    engine = start(Net(), config(stage))
    moved = engine.to(engine.device).float()
    engine.module.to("cpu", torch.float32)
    assert moved is engine
    engine.backward(engine(batch(0)))
    engine.step()
    assert engine.get_global_grad_norm() > 0
    if stage == 3:
        with pytest.raises(RuntimeError, match="'first.w'"):
            engine.module.bfloat16()
    else:
        engine.module.bfloat16()
        with pytest.raises(ValueError, match="'first.w' is now .*BFloat16.*undo the conversion"):
            engine(batch(0))
        engine.module.float()
        engine.backward(engine(batch(0)))  # torch made new gradient accumulators meanwhile
        assert all(p.grad is None for p in engine.module.parameters())
        engine.step()
        assert engine.get_global_grad_norm() > 0
    engine.destroy()


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_conversions(stage):
    run(check_conversions, 2, stage)


class Picture(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3)
        self.mix = nn.Parameter(torch.randn(7, 5).t())

    def forward(self, x):
        return (self.conv(x).mean((2, 3)) @ self.mix).pow(2).mean()


def check_memory_formats(stage, optimizer):
    torch.manual_seed(0)
    model = Picture().to(memory_format=torch.channels_last)
    want = {name: p.detach().clone() for name, p in model.named_parameters()}
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad, safe_set_full_fp32_param
    params = {"lr": 0.05}
    engine = start(model, config(stage, optimizer=None) | {"optimizer": {"type": optimizer, "params": params}})
    for name, p in engine.module.named_parameters():
        assert torch.equal(safe_get_full_fp32_param(p), want[name]), name
    plain = Picture().to(memory_format=torch.channels_last)
    plain.load_state_dict(want)
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    plain(x).backward()
    engine.backward(engine(x))
    for name, p in engine.module.named_parameters():
        torch.testing.assert_close(safe_get_full_grad(p), dict(plain.named_parameters())[name].grad, msg=name)
    for name, p in engine.module.named_parameters():
        safe_set_full_fp32_param(p, want[name] + 1)
    assert_close(full_parameters(engine.module), {name: value + 1 for name, value in want.items()})
    engine.destroy()


@pytest.mark.parametrize("stage", [1, 3])
def test_parameters_that_are_not_row_major(stage):
    run(check_memory_formats, 2, stage, "SGD")


def muon_of_layout(stage, transposed):
    torch.manual_seed(3)
    model = nn.Linear(6, 4, bias=False)
    if transposed:
        model.weight = nn.Parameter(model.weight.detach().t().contiguous().t())
    engine = start(model, config(stage, optimizer=None) | {"optimizer": {"type": "Muon", "params": {"lr": 0.1}}})
    for step in range(2):
        engine.backward(engine(torch.randn(3, 6, generator=torch.Generator().manual_seed(step))).pow(2).mean())
        engine.step()
    values = full_parameters(engine.module)
    engine.destroy()
    return values["weight"].contiguous()


def check_muon(stage):
    torch.testing.assert_close(muon_of_layout(stage, True), muon_of_layout(stage, False))


@pytest.mark.parametrize("stage", [0, 3])
def test_muon_sees_the_matrix_and_not_its_memory(stage):
    run(check_muon, 2, stage)


@on_ranks(2)
def test_models_of_an_engine_can_be_pickled():
    for stage in (1, 3):
        engine = start(Net(), config(stage))
        from deepspeed.zero import GatheredParameters
        with GatheredParameters(list(engine.module.parameters())):
            file = io.BytesIO()
            torch.save(engine.module, file)
            want = [p.detach().clone() for p in engine.module.parameters()]
        file.seek(0)
        copy = torch.load(file, weights_only=False)
        assert all(torch.equal(a, b) for a, b in zip(copy.parameters(), want))
        engine.destroy()


@on_ranks(2)
def test_the_state_of_a_client_optimizer_is_loaded_whole():
    def engine_with_optimizer():
        torch.manual_seed(0)
        model = Net()
        return start(model, config(1, optimizer=None), optimizer=torch.optim.AdamW(model.parameters(), lr=0.01, amsgrad=True))

    def steps(engine, numbers):
        for step in numbers:
            engine.backward(engine(batch(step)))
            engine.step()
        return full_parameters(engine.module)

    first = engine_with_optimizer()
    steps(first, range(2))
    saved = io.BytesIO()
    torch.save(first.optimizer.state_dict(), saved)
    want = steps(first, range(2, 4))
    other = engine_with_optimizer()
    steps(other, range(5))  # has a step count of its own by now
    saved.seek(0)
    other.optimizer.load_state_dict(torch.load(saved, weights_only=False))
    got = steps(other, range(2, 4))
    assert all(torch.equal(got[name], want[name]) for name in want)
    first.destroy()
    other.destroy()


# ------------------------------------------------------------------------------------------- freezing and unfreezing while training

PHASES = [{"first"}, set(), {"linear"}, {"first", "linear"}, set(), {"first"}, set()]   # what is frozen, step by step


def freeze(model, names):
    for name, child in model.named_children():
        child.requires_grad_(name not in names)


def check_freezing(stage, optimizer, params, precision="fp32"):
    from tests.parity.tiny import assert_same
    kind = getattr(torch.optim, optimizer)
    batches = [torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(step)) for step in range(len(PHASES))]
    torch.manual_seed(0)
    plain = Net()
    torch.manual_seed(0)
    cfg = config(stage, optimizer=None, zero_allow_untested_optimizer=True, precision=precision)
    engine = start(Net(), cfg | {"optimizer": {"type": optimizer, "params": params}})
    stepper = kind(plain.parameters(), **params)
    for names, x in zip(PHASES, batches):
        freeze(plain, names)
        freeze(engine.module, names)
        before = full_parameters(engine.module)
        engine.backward(engine(x.to(engine.get_data_types()[0])))
        engine.step()
        after = full_parameters(engine.module)
        frozen = [name for name in before if name.split(".")[0] in names]
        assert_same({name: after[name] for name in frozen}, {name: before[name] for name in frozen})
        if precision == "fp32":
            stepper.zero_grad()
            plain(x).backward()
            stepper.step()
    if precision == "fp32":
        for name, value in plain.named_parameters():
            torch.testing.assert_close(after[name], value.detach(), msg=lambda text: f"{name}: {text}", rtol=1e-5, atol=1e-6)
    engine.destroy()


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_freezing_and_unfreezing_is_that_of_torch(stage):
    """Momentum, decay and each parameter's own count of updates rest while it is frozen."""
    run(check_freezing, 2, stage, "AdamW", {"lr": 0.01, "weight_decay": 0.1})


@pytest.mark.parametrize("optimizer, params", [("SGD", {"lr": 0.05, "momentum": 0.9, "dampening": 0.1}), ("RAdam", {"lr": 0.01})])
def test_freezing_with_other_optimizers(optimizer, params):
    run(check_freezing, 2, 2, optimizer, params)


@pytest.mark.parametrize("optimizer", ["Lamb", "Muon"])
def test_what_is_frozen_keeps_its_bits(optimizer):
    run(check_frozen_bits, 2, optimizer)


def check_frozen_bits(optimizer):
    torch.manual_seed(0)
    engine = start(Net(), config(3, precision="bf16") | {"optimizer": {"type": optimizer, "params": {"lr": 0.01, "weight_decay": 0.1}}})
    for names in [set(), {"linear"}, {"first"}]:
        freeze(engine.module, names)
        before = full_parameters(engine.module)
        engine.backward(engine(torch.randn(2, WIDTH, dtype=torch.bfloat16)))
        engine.step()
        for name, value in full_parameters(engine.module).items():
            assert torch.equal(value, before[name]) == (name.split(".")[0] in names), name
    engine.destroy()


@on_ranks(2)
def test_missed_updates_are_part_of_the_optimizer_state():
    runs = []
    for reload in (False, True):
        torch.manual_seed(0)
        engine = start(Net(), config(1, lr=0.01))
        for step, names in enumerate(PHASES):
            if reload and step == 4:
                state = engine.optimizer.state_dict()
                saved = io.BytesIO()
                torch.save(state, saved)
                saved.seek(0)
                values = full_parameters(engine.module)
                engine.destroy()
                engine = start(Net(), config(1, lr=0.01))
                engine.optimizer.load_state_dict(torch.load(saved, weights_only=False))
                assert all(torch.equal(value, values[name]) for name, value in full_parameters(engine.module).items())
            freeze(engine.module, names)
            engine.backward(engine(torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(step))))
            engine.step()
        runs.append(full_parameters(engine.module))
        engine.destroy()
    assert all(torch.equal(value, runs[1][name]) for name, value in runs[0].items())


@on_ranks(2)
@pytest.mark.parametrize("stage", [0, 3])
def test_what_was_frozen_from_the_start_cannot_be_trained_later(stage):
    model = Net()
    model.linear.requires_grad_(False)
    cfg = config(stage)
    engine = start(model, cfg, model_parameters=model.parameters())
    engine.backward(engine(torch.ones(2, WIDTH)))
    engine.step()
    model.linear.requires_grad_(True)
    with torch.no_grad():
        engine(torch.ones(2, WIDTH))
    with pytest.raises(ValueError, match="'linear.weight' requires a gradient now, but was frozen.*freeze it afterwards"):
        engine(torch.ones(2, WIDTH))
    model.linear.requires_grad_(False)
    engine.backward(engine(torch.ones(2, WIDTH)))
    engine.destroy()
    # What the caller keeps out of the optimizer is his own business, as in torch.
    model = Net()
    model.linear.requires_grad_(False)
    engine = start(model, cfg, model_parameters=[p for p in model.parameters() if p.requires_grad])
    model.linear.requires_grad_(True)
    engine.backward(engine(torch.ones(2, WIDTH)))
    assert model.linear.bias.grad is not None
    engine.destroy()
