# SPDX-License-Identifier: Apache-2.0
"""The Hugging Face Trainer runs on this library unchanged and gets the numbers it gets without it. tests/compat/hf.sh installs what this needs."""
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
@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("name", ["llama", "t5"])
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


def _seq2seq(model, rows, folder, **settings):
    from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments
    training.forget_accelerate()
    args = Seq2SeqTrainingArguments(output_dir=os.path.join(folder, "out"), deepspeed=training.config(3), use_cpu=True, report_to=[],
                                    predict_with_generate=True, per_device_eval_batch_size=2, generation_max_length=10, max_steps=2,
                                    disable_tqdm=True, save_strategy="no", log_level="error", **settings)
    model = model or models.model_class("t5").from_pretrained(os.path.join(folder, "t5"))
    return Seq2SeqTrainer(model=model, args=args, train_dataset=rows, eval_dataset=rows)


@on_ranks(2, timeout=TIMEOUT_S)
def test_a_model_is_evaluated_by_one_trainer_and_trained_by_the_next(folder):
    """The first one's engine is destroyed; the sharded weights stay with the model."""
    training.starting_point("t5", folder)
    rows = models.dataset("t5", 8)
    first = _seq2seq(None, rows, folder)
    before = first.predict(rows)
    first.accelerator.free_memory()
    second = _seq2seq(first.model, rows, folder)
    del first
    second.train()
    after = second.predict(rows)
    assert before.predictions.shape[0] == after.predictions.shape[0] == len(rows)
    assert after.metrics["test_loss"] < before.metrics["test_loss"]
