# SPDX-License-Identifier: Apache-2.0
"""The Trainer saves, resumes and finds its best model through this library: losses go on as if nothing had happened."""
import importlib.util
import os
import tempfile

import pytest
import torch
import torch.distributed as dist

from tests.parity.launch import on_ranks, run

for _package in ("transformers", "accelerate", "peft"):
    if importlib.util.find_spec(_package) is None:
        pytest.skip(f"{_package} is not installed", allow_module_level=True)

from tests.compat.hf import models, training  # noqa: E402

TIMEOUT_S = 170
STEPS, HALF = 6, 3


@pytest.fixture
def folder():
    with tempfile.TemporaryDirectory(prefix="hf-resume-") as path:
        yield path


def train(folder, stage, resume=None, lora=False, name="llama-tied", out="out", gather=True, **settings):
    """(losses of all steps, the trainer)"""
    from transformers import Trainer
    start = training.starting_point(name, folder)
    section = training.config(stage)
    if stage == 3:
        section["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = gather
    settings = {"save_strategy": "steps", "save_steps": HALF, "per_device_train_batch_size": 4 // dist.get_world_size(), **settings}
    args = training.arguments(os.path.join(folder, out), stage, section, max_steps=STEPS, **settings)
    model = models.model_class(name).from_pretrained(start)
    if lora:
        model = training.with_lora(model)
    trainer = Trainer(model=model, args=args, train_dataset=models.dataset(name, 4 * STEPS), eval_dataset=models.dataset(name, 8, seed=2))
    trainer.train(resume_from_checkpoint=resume)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], trainer


def resume_at(folder, stage, wanted):
    found, _ = train(folder, stage, os.path.join(folder, "out", f"checkpoint-{HALF}"), out=f"again-{dist.get_world_size()}")
    assert len(found) == STEPS and training.worst(found, wanted) <= 1e-5


def losses(folder, stage):
    return train(folder, stage)[0]


@on_ranks(2, timeout=TIMEOUT_S)
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("stage", [2, 3])
def test_resuming_changes_no_bit(stage, lora, folder):
    wanted, first = train(folder, stage, lora=lora)
    found, second = train(folder, stage, os.path.join(folder, "out", f"checkpoint-{HALF}"), lora=lora, out="again")
    assert found == wanted
    assert second.state.global_step == STEPS


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("before, after", [(2, 1), (1, 2)])
def test_another_number_of_ranks(before, after, stage, folder):
    wanted = run(losses, before, folder, stage, timeout=TIMEOUT_S)[0]
    run(resume_at, after, folder, stage, wanted, timeout=TIMEOUT_S)


@on_ranks(2, timeout=TIMEOUT_S)
@pytest.mark.parametrize("stage", [2, 3])
def test_the_best_model_is_what_remains(stage, folder):
    """What counts as best here is the highest loss, which the first checkpoint has."""
    _, trainer = train(folder, stage, eval_strategy="steps", eval_steps=HALF, load_best_model_at_end=True, metric_for_best_model="eval_loss",
                       greater_is_better=True, learning_rate=0.5, lr_scheduler_type="constant")
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{HALF}")
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, rel=1e-5)


@on_ranks(2, timeout=TIMEOUT_S)
@pytest.mark.parametrize("gather", [True, False], ids=["gathered", "sharded"])
def test_only_the_model(gather, folder):
    _, trainer = train(folder, 3, save_only_model=True, gather=gather)
    path = os.path.join(folder, "out", f"checkpoint-{STEPS}")
    dist.barrier()
    names = os.listdir(path)
    if not gather:   # the Trainer then has the engine save what can be continued from, and says so
        assert any(name.startswith("global_step") for name in names) and "model.safetensors" not in names
        return
    assert "model.safetensors" in names and not any(name.startswith("global_step") for name in names)
    found = trainer.predict(trainer.eval_dataset).predictions
    wanted = training.reload_logits("llama-tied", None, path, False, trainer.eval_dataset)
    assert torch.allclose(torch.from_numpy(training.logits_of(found)), torch.from_numpy(wanted), rtol=1e-4, atol=1e-5)


@on_ranks(2, timeout=TIMEOUT_S)
@pytest.mark.parametrize("merge", [False, True], ids=["with adapters", "merged"])
@pytest.mark.parametrize("stage", [2, 3])
def test_weights_stream_under_the_names_of_the_model(stage, merge, folder):
    """What a server of the model would take over, with PEFT's own merge as the measure."""
    _, trainer = train(folder, stage, lora=True, save_strategy="no", learning_rate=1e-2)
    engine = trainer.model_wrapped
    found = {name: value.clone() for name, value in engine.iter_full_params(bucket_bytes=20_000, merge_lora=merge)}
    import deepspeed
    with deepspeed.zero.GatheredParameters(list(trainer.model.parameters())):
        if not merge:
            wanted = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        else:
            import copy
            plain = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
            training.forget_accelerate()
            fresh = training.with_lora(models.build("llama-tied"))
            fresh.load_state_dict(plain, strict=False)
            wanted = dict(copy.deepcopy(fresh).merge_and_unload().named_parameters())
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.allclose(found[name], value, rtol=1e-6, atol=1e-7), name


@on_ranks(2, timeout=TIMEOUT_S)
@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("codes", ["of one byte", "packed", "packed halves"])
def test_adapters_are_not_merged_into_codes(codes, stage):
    import deepspeed
    training.forget_accelerate()
    model = training.with_lora(models.build("llama-tied"))
    path, layer = next((path, layer) for path, layer in model.named_modules() if hasattr(layer, "lora_A"))
    shape = tuple(layer.get_base_layer().weight.shape)
    coded = {"of one byte": torch.zeros(shape, dtype=torch.uint8), "packed": torch.zeros(shape[0] * shape[1] // 2, 1, dtype=torch.uint8),
             "packed halves": torch.zeros(shape[0] * shape[1] // 2, 1, dtype=torch.bfloat16)}[codes]
    layer.get_base_layer().weight = torch.nn.Parameter(coded, requires_grad=False)
    section = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": stage}, "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}
    engine = deepspeed.initialize(model=model, config=section)[0]
    with pytest.raises(ValueError, match=f"{path}.*{tuple(coded.shape)[0]}.*merge_lora=False"):
        engine.iter_full_params(merge_lora=True)
    assert sum(1 for _ in engine.iter_full_params()) == sum(1 for _ in model.parameters())
    engine.destroy()
