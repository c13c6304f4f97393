# SPDX-License-Identifier: Apache-2.0
"""torch.compile around, inside and under the engine: the numbers of eager, graphs that end at unit borders only, nothing compiled twice."""
import contextlib

import pytest
import torch

from tests.parity.launch import on_ranks
from tests.parity.tiny import Layer, batch, config, engine_of, tiny
from tests.parity.training import full_parameters

STEPS = 4
TIMEOUT_S = 150


def compile_engine(model, cfg, **options):
    engine = engine_of(model, cfg)
    engine.compile(**options)
    assert engine.is_compiled
    return engine, engine


def compile_model_first(model, cfg, **options):
    engine = engine_of(torch.compile(model, **options), cfg)
    return engine, engine


def compile_model_in_place_first(model, cfg, **options):
    model.compile(**options)
    engine = engine_of(model, cfg)
    return engine, engine


def compile_around_engine(model, cfg, **options):
    engine = engine_of(model, cfg)
    return engine, torch.compile(engine, **options)


def compile_layers(model, cfg, **options):
    """As Accelerate's regional compilation does it."""
    engine = engine_of(model, cfg)
    for layer in model.layers:
        layer.compile(**options)
    return engine, engine


WAYS = [compile_engine, compile_model_first, compile_model_in_place_first, compile_around_engine, compile_layers]


@contextlib.contextmanager
def fresh_dynamo():
    import torch._dynamo as dynamo
    from torch._dynamo.utils import counters
    dynamo.reset()
    counters.clear()
    with dynamo.config.patch(recompile_limit=dynamo.config.recompile_limit):
        yield counters
    dynamo.reset()


def trained(engine, forward, step_of=lambda step: batch(step)):
    """(losses of this rank, gradient norms, parameters). From the third step on compiling anything is an error."""
    import torch._dynamo as dynamo
    losses, norms = [], []
    for step in range(STEPS):
        with dynamo.config.patch(error_on_recompile=step >= 2):
            loss = forward(step_of(step))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
        norms.append(engine.get_global_grad_norm())
    return torch.tensor(losses), torch.tensor(norms), {name.removeprefix("_orig_mod."): value for name, value in full_parameters(engine.module).items()}


def check(way, stage, **options):
    with fresh_dynamo() as counters:
        eager = engine_of(tiny(), config(stage))
        losses, norms, parameters = trained(eager, eager)
        assert not counters["stats"]
        engine, forward = way(tiny(), config(stage), **options)
        found = trained(engine, forward)
        torch.testing.assert_close(found[0], losses, rtol=1e-6, atol=0)
        torch.testing.assert_close(found[1], norms, rtol=1e-6, atol=0)
        for name, value in parameters.items():
            torch.testing.assert_close(found[2][name], value, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
        assert counters["stats"]["unique_graphs"] > 0
        broken = {text: count for text, count in counters["graph_break"].items() if "borders of ZeRO units" not in text}
        assert broken == {}
        if stage < 3:
            assert not counters["graph_break"]
        return counters["stats"]["unique_graphs"]


@on_ranks(2, timeout=TIMEOUT_S)
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("way", WAYS)
def test_numbers_of_eager_and_borders(way, stage):
    graphs = check(way, stage, backend="aot_eager")
    if stage < 3 and way is not compile_layers:
        assert graphs == 1


@on_ranks(2, timeout=400)
def test_inductor():
    import torch._inductor.config as inductor
    with inductor.patch(compile_threads=1):
        check(compile_engine, 3, backend="inductor")


class Numbered(Layer):
    number = 0

    def forward(self, x):
        return super().forward(x * (1.0 + self.number))


@on_ranks(2, timeout=TIMEOUT_S)
def test_every_instance_of_a_layer_is_compiled():
    """More layers than Dynamo's limit, each with a number of its own in its computation."""
    import torch._dynamo as dynamo
    count = dynamo.config.recompile_limit + 2
    model = tiny()
    model.layers = torch.nn.ModuleList(Numbered(9) for _ in range(count))
    for number, layer in enumerate(model.layers):
        layer.number = number
    with fresh_dynamo() as counters:
        engine, forward = compile_engine(model, config(3, zero={"stage3_prefetch_bucket_size": 150}), backend="aot_eager")
        trained(engine, forward)
        assert counters["stats"]["unique_graphs"] >= count


@on_ranks(2)
def test_a_whole_graph_cannot_be_had_from_units():
    with pytest.raises(ValueError, match="fullgraph cannot hold at ZeRO stage 3.*use stage 2"):
        engine_of(tiny(), config(3)).compile(backend="eager", compile_kwargs={"fullgraph": True})
    with fresh_dynamo():
        engine = engine_of(tiny(), config(2))
        engine.compile(backend="eager", compile_kwargs={"fullgraph": True})
        trained(engine, engine)
