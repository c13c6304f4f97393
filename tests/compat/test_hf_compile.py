# SPDX-License-Identifier: Apache-2.0
"""torch.compile on Hugging Face models under the engine: the numbers of eager, no graph broken but at unit borders, nothing compiled after
the second step. "Broken by the model itself" is what plain torch.compile says of the same model without us."""
import importlib.util

import pytest
import torch
import torch.distributed as dist

from tests.parity.launch import on_ranks
from tests.parity.test_compile import compile_engine, compile_model_first, fresh_dynamo, trained
from tests.parity.training import config
from tests.parity.tiny import engine_of

for _package in ("transformers", "accelerate"):
    if importlib.util.find_spec(_package) is None:
        pytest.skip(f"{_package} is not installed", allow_module_level=True)

from tests.compat.hf import models, training  # noqa: E402

TIMEOUT_S = 240
CASES = [("llama", 1), ("llama", 2), ("llama", 3), ("gpt2", 2), ("gpt2", 3), ("bert", 2), ("bert", 3)]
# One layer a unit, and a part of one.
BUDGETS = {"layers": 10000, "parts": 2000}


def batch_of(name):
    from transformers.data.data_collator import default_data_collator

    def batch(step, rank=None):
        rank = dist.get_rank() if rank is None else rank
        found = default_data_collator(models.dataset(name, 2, seed=100 * step + rank))
        return found if models.ARCHITECTURES[name].data != "causal" else {**found, "use_cache": False}
    return batch


def loss_of(forward):
    return lambda batch: forward(**batch).loss


def broken_by_the_model(name):
    """Reasons that plain torch.compile gives."""
    with fresh_dynamo() as counters:
        compiled = torch.compile(models.build(name).train(), backend="aot_eager")
        loss_of(compiled)(batch_of(name)(0)).backward()
        return {text.splitlines()[0] for text in counters["graph_break"]}


def engine_config(stage, budget):
    return config(stage, zero={"stage3_prefetch_bucket_size": BUDGETS[budget]})


def check(name, stage, way, budget):
    with fresh_dynamo() as counters:
        eager = engine_of(models.build(name).train(), engine_config(stage, budget))
        losses, norms, parameters = trained(eager, loss_of(eager), batch_of(name))
        assert not counters["stats"]
        engine, forward = way(models.build(name).train(), engine_config(stage, budget), backend="aot_eager")
        found = trained(engine, loss_of(forward), batch_of(name))
        torch.testing.assert_close(found[0], losses, rtol=1e-6, atol=0)
        torch.testing.assert_close(found[1], norms, rtol=1e-5, atol=0)
        for key, value in parameters.items():
            torch.testing.assert_close(found[2][key], value, rtol=1e-4, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")
        broken = {text.splitlines()[0] for text in counters["graph_break"] if "borders of ZeRO units" not in text}
        borders = sum(count for text, count in counters["graph_break"].items() if "borders of ZeRO units" in text)
        graphs = counters["stats"]["unique_graphs"]
    assert (borders > 0) == (stage == 3)
    assert broken <= (broken_by_the_model(name) if broken else set())
    return graphs


@on_ranks(2, timeout=TIMEOUT_S)
@pytest.mark.parametrize("name, stage", CASES)
def test_engine_compile(name, stage):
    graphs = check(name, stage, compile_engine, "layers")
    if (name, stage) == ("llama", 3):
        assert graphs <= 6   # embedding, layer, norm, head and what lies between: the three layers share theirs


@on_ranks(2, timeout=TIMEOUT_S)
def test_units_smaller_than_layers():
    check("bert", 3, compile_engine, "parts")


@on_ranks(2, timeout=TIMEOUT_S)
def test_compiled_by_the_caller():
    check("llama", 3, compile_model_first, "layers")


@on_ranks(2, timeout=TIMEOUT_S)
@pytest.mark.parametrize("stage", [2, 3])
def test_trainer_with_torch_compile(stage, tmp_path):
    """--torch_compile: Accelerate calls engine.compile()."""
    folder = [str(tmp_path)]
    dist.broadcast_object_list(folder)
    settings = dict(max_steps=4, save=False)
    eager = training.train("llama", folder[0], stage, **settings)
    with fresh_dynamo() as counters:
        compiled = training.train("llama", folder[0], stage, torch_compile=True, torch_compile_backend="aot_eager", **settings)
        assert counters["stats"]["unique_graphs"] > 0
        assert [text for text in counters["graph_break"] if "borders of ZeRO units" not in text] == []
    assert max(training.worst(compiled.losses, eager.losses), training.worst(compiled.norms, eager.norms)) <= 1e-5
