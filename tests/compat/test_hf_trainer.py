# SPDX-License-Identifier: Apache-2.0
"""The Hugging Face Trainer runs on this library unchanged and gets the numbers it gets without it. tests/compat/hf.sh installs what this needs."""
import importlib.util
import math
import os
import tempfile

import pytest
import torch
import torch.distributed as dist

from tests.parity.launch import on_ranks, run

for _package in ("transformers", "accelerate", "peft"):
    if importlib.util.find_spec(_package) is None:
        pytest.skip(f"{_package} is not installed", allow_module_level=True)

from tests.compat.hf import matrix, models, training  # noqa: E402

TIMEOUT_S = 170
# A few of each kind; tests/compat/hf.sh runs them all and writes docs/compatibility.md.
QUICK = ["llama-tied", "gpt2", "qwen2-moe", "t5", "vit"]


@pytest.fixture
def folder():
    with tempfile.TemporaryDirectory(prefix="hf-") as path:
        yield path


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name", QUICK)
def test_losses_norms_and_saved_weights(name, lora, folder):
    row = run(matrix.run_cell, 2, name, lora, folder, timeout=TIMEOUT_S)[0]
    assert {stage: cell for stage, cell in row.items() if not matrix.passed(cell)} == {}


VARIANTS = {
    "accumulation": dict(gradient_accumulation_steps=3, max_steps=4),
    "no clipping": dict(max_grad_norm=0.0, max_steps=4),
    "tight clipping": dict(max_grad_norm=0.1, max_steps=4),
    "checkpointing": dict(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False}, max_steps=4),
    "reentrant checkpointing": dict(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True}, max_steps=4),
    "uneven epochs": dict(max_steps=-1, num_train_epochs=2, samples=22, gradient_accumulation_steps=3),
    "smoothing, noise, decay": dict(label_smoothing_factor=0.1, neftune_noise_alpha=5.0, weight_decay=0.1, lr_scheduler_type="cosine",
                                    warmup_steps=2, max_steps=4),
    "adagrad": dict(optim="adagrad", max_steps=4),
    "all at once": dict(gradient_accumulation_steps=3, gradient_checkpointing=True, max_grad_norm=0.1, max_steps=4),
}


@on_ranks(2, timeout=TIMEOUT_S)
@pytest.mark.parametrize("variant", VARIANTS)
def test_arguments_of_the_trainer(variant, folder):
    settings = VARIANTS[variant]
    plain = training.train("llama", folder, None, save=False, **settings)
    for stage in (0, 2, 3):
        found = training.train("llama", folder, stage, save=False, **settings)
        assert max(training.worst(found.losses, plain.losses), training.worst(found.norms, plain.norms)) <= matrix.LOSS_BAR, stage


@on_ranks(2, timeout=TIMEOUT_S)
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_bf16(lora, folder):
    """Plain Trainer keeps fp32 weights and casts under autocast, we keep bf16 weights and fp32 masters: rounding differs, 2**-8 a step."""
    plain = training.train("llama", folder, None, lora, save=False, bf16=True, max_steps=6)
    for stage in (0, 2, 3):
        found = training.train("llama", folder, stage, lora, save=False, bf16=True, max_steps=6)
        assert training.worst(found.losses, plain.losses) <= 2**-8 and training.worst(found.norms, plain.norms) <= 6 * 2**-8, stage


@on_ranks(2, timeout=TIMEOUT_S)
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_fp16(lora, folder):
    """Plain Trainer has no fp16 without a GPU; this is fp16 beside fp32, with a dynamic loss scale that fits from the beginning."""
    plain = training.train("llama", folder, None, lora, save=False, max_steps=6)
    for stage in (0, 2, 3):
        found = training.train("llama", folder, stage, lora, save=False, fp16=True, max_steps=6)
        assert training.worst(found.losses, plain.losses) <= 2**-11 and training.worst(found.norms, plain.norms) <= 6 * 2**-11, stage


@on_ranks(2, timeout=TIMEOUT_S)
@pytest.mark.parametrize("settings", [dict(bf16_full_eval=True), dict(fp16=True, fp16_full_eval=True)], ids=["bf16", "fp16"])
def test_the_whole_evaluation_in_half_precision(settings, folder):
    """Trainer calls to(dtype, device) on a model that is sharded, before and after training."""
    plain = training.train("llama", folder, None, save=False, max_steps=3, **settings)
    for stage in (2, 3):
        found = training.train("llama", folder, stage, save=False, max_steps=3, **settings)
        assert training.worst([found.eval_loss], [plain.eval_loss]) <= 2**-8, stage


@on_ranks(2, timeout=TIMEOUT_S)
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_steps_that_overflow_in_fp16_change_nothing_not_even_the_schedule(stage, folder):
    """Every step sees the same samples: without the skipped ones, it is the run that skips none."""
    settings = dict(save=False, samples=training.SAMPLES_A_STEP, learning_rate=1e-2, lr_scheduler_type="constant_with_warmup", warmup_steps=4,
                    max_steps=8)
    plain = training.train("llama", folder, None, **settings)
    ds_config = training.config(stage, fp16={"enabled": "auto", "loss_scale": 0, "initial_scale_power": 20, "hysteresis": 1})
    found = training.train("llama", folder, stage, ds_config=ds_config, fp16=True, **settings)
    kept = [step for step, norm in enumerate(found.norms) if math.isfinite(norm)]
    assert 8 - len(kept) == found.skipped and 2 <= found.skipped <= 4
    assert training.worst([found.losses[step] for step in kept], plain.losses[:len(kept)]) <= 2**-11
    assert training.worst([found.norms[step] for step in kept], plain.norms[:len(kept)]) <= 6 * 2**-11


@on_ranks(2, timeout=TIMEOUT_S)
@pytest.mark.parametrize("name, stage", [("llama", 2), ("llama", 3), ("t5", 2), ("t5", 3), ("mixtral", 3), ("qwen2-moe", 3), ("qwen3-moe", 3)])
def test_generation(name, stage, folder):
    """Ranks that generate different numbers of tokens, after a training that changes nothing."""
    from transformers import Trainer
    start = training.starting_point(name, folder)
    ids = torch.randint(3, models.VOCABULARY, (2, 5), generator=torch.Generator().manual_seed(dist.get_rank()))
    length = 6 + 3 * dist.get_rank()
    args = training.arguments(os.path.join(folder, "out"), stage, max_steps=2, learning_rate=0.0)
    model = models.model_class(name).from_pretrained(start)
    trainer = Trainer(model=model, args=args, train_dataset=models.dataset(name, 8))
    trainer.train()
    model.eval()
    found = trainer.model_wrapped.generate(ids, max_new_tokens=length, do_sample=False, synced_gpus=True)
    training.forget_accelerate()
    wanted = models.model_class(name).from_pretrained(start).eval().generate(ids, max_new_tokens=length, do_sample=False)
    assert torch.equal(found[:, :wanted.shape[1]], wanted)


def _seq2seq(name, folder, stage, rows, model=None, **settings):
    from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments
    start = training.starting_point(name, folder)
    args = training.arguments(os.path.join(folder, "out"), stage, kind=Seq2SeqTrainingArguments, predict_with_generate=True,
                              generation_max_length=10, **settings)
    return Seq2SeqTrainer(model=model or models.model_class(name).from_pretrained(start), args=args, train_dataset=rows, eval_dataset=rows[:6],
                          compute_metrics=_mean_token)


def _mean_token(prediction):
    return {"token": float(prediction.predictions.mean())}


def _evaluated_by_generating(name, folder, stage, **settings):
    """A training that generates on its way, a last batch with one sample less than ranks; every figure, and the tokens at the end."""
    trainer = _seq2seq(name, folder, stage, models.dataset(name, 20), eval_strategy="steps", eval_steps=2, max_steps=5, learning_rate=3e-2,
                       **settings)
    trainer.train()
    figures = [entry[key] for entry in trainer.state.log_history for key in ("loss", "eval_loss", "eval_token") if key in entry]
    predicted = trainer.predict(models.dataset(name, 7, seed=2), max_new_tokens=8, num_beams=2)
    return figures + [predicted.metrics["test_loss"]], predicted.predictions


@on_ranks(2, timeout=TIMEOUT_S)
@pytest.mark.parametrize("name", ["t5", "bart"])
def test_seq2seq_with_generation_in_evaluation(name, folder):
    wanted, tokens = _evaluated_by_generating(name, folder, None)
    assert len(wanted) == 5 + 3 * 2 + 1
    for stage in (2, 3):
        found, generated = _evaluated_by_generating(name, folder, stage)
        assert training.worst(found, wanted) <= matrix.LOSS_BAR, stage
        assert generated.shape == tokens.shape and (generated == tokens).all(), stage


@on_ranks(2, timeout=TIMEOUT_S)
def test_a_model_is_evaluated_by_one_trainer_and_trained_by_the_next(folder):
    """The first one's engine is destroyed; the sharded weights stay with the model."""
    rows = models.dataset("t5", 8)
    first = _seq2seq("t5", folder, 3, rows, max_steps=2)
    before = first.predict(rows)
    first.accelerator.free_memory()
    second = _seq2seq("t5", folder, 3, rows, first.model, max_steps=2)
    del first
    second.train()
    after = second.predict(rows)
    assert before.predictions.shape[0] == after.predictions.shape[0] == len(rows)
    assert after.metrics["test_loss"] < before.metrics["test_loss"]


def _three_steps(trainer):
    """Losses and norms."""
    trainer.train()
    return [value for entry in trainer.state.log_history if "loss" in entry for value in (entry["loss"], entry["grad_norm"])]


@on_ranks(2, timeout=TIMEOUT_S)
@pytest.mark.parametrize("stage", [2, 3])
def test_one_trainer_trains_anew(stage, folder):
    """transformers destroys the engine and goes on with it: the error says what to write, and that gives the numbers of a new Trainer."""
    from transformers import Trainer
    rows, kind, saved = models.dataset("llama", 12), models.model_class("llama"), os.path.join(folder, "saved")
    start = training.starting_point("llama", folder)
    args = training.arguments(os.path.join(folder, "out"), stage, max_steps=3)
    trainer = Trainer(model=kind.from_pretrained(start), args=args, train_dataset=rows, eval_dataset=rows)
    if stage == 3:   # below, Trainer refuses to evaluate before it trains
        trainer.evaluate()
    else:
        trainer.train()
    trainer.save_model(saved)
    with pytest.raises(RuntimeError, match="trainer.model_wrapped = trainer.model"):
        trainer.train()
    trainer.model_wrapped = trainer.model
    found = _three_steps(trainer)
    assert len(found) == 6
    args = training.arguments(os.path.join(folder, "out"), stage, max_steps=3)
    assert found == _three_steps(Trainer(model=kind.from_pretrained(saved), args=args, train_dataset=rows))
