# SPDX-License-Identifier: Apache-2.0
"""TRL's trainers beside themselves without this library, on a tiny model with a tokenizer made on the spot."""
import importlib.util
import os
import tempfile

import pytest

from tests.parity.launch import on_ranks

for _package in ("transformers", "accelerate", "trl", "datasets"):
    if importlib.util.find_spec(_package) is None:
        pytest.skip(f"{_package} is not installed", allow_module_level=True)

from tests.compat.hf import matrix, models, training  # noqa: E402

_COMMON = dict(use_cpu=True, report_to=[], per_device_train_batch_size=2, max_steps=4, logging_steps=1, save_strategy="no", disable_tqdm=True,
               seed=3, bf16=False, learning_rate=1e-3, log_level="error", gradient_checkpointing=False)


def tokenizer():
    from tokenizers import Tokenizer, models as kinds, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{number}" for number in range(90))]
    made = Tokenizer(kinds.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def text(row, words):
    return " ".join(f"w{(7 * row + word * word) % 90}" for word in range(words))


def _sft(start, **common):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer
    args = SFTConfig(max_length=16, **common)
    rows = Dataset.from_list([{"text": text(row, 8)} for row in range(16)])
    return SFTTrainer(model=models.model_class("llama").from_pretrained(start), args=args, train_dataset=rows, processing_class=tokenizer())


def _dpo(start, **common):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer
    args = DPOConfig(max_length=24, **common)
    rows = Dataset.from_list([{"prompt": text(row, 4), "chosen": " " + text(row + 3, 5), "rejected": " " + text(row + 5, 5)}
                              for row in range(16)])
    return DPOTrainer(model=models.model_class("llama").from_pretrained(start), args=args, train_dataset=rows, processing_class=tokenizer())


def _reward(start, **common):
    from datasets import Dataset
    from transformers import LlamaForSequenceClassification
    from trl import RewardConfig, RewardTrainer
    args = RewardConfig(max_length=24, **common)
    rows = Dataset.from_list([{"chosen": text(row + 3, 5), "rejected": text(row + 5, 6)} for row in range(16)])
    return RewardTrainer(model=LlamaForSequenceClassification.from_pretrained(start), args=args, train_dataset=rows,
                         processing_class=tokenizer())


TRAINERS = {"SFT": _sft, "DPO": _dpo, "reward": _reward}


def losses(kind, stage, folder, start):
    training.forget_accelerate()
    trainer = TRAINERS[kind](start, output_dir=os.path.join(folder, "out"), deepspeed=None if stage is None else training.config(stage),
                             **_COMMON)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.fixture
def folder():
    with tempfile.TemporaryDirectory(prefix="hf-") as path:
        yield path


@on_ranks(2, timeout=170)
@pytest.mark.parametrize("kind", TRAINERS)
def test_losses(kind, folder):
    start = training.starting_point("llama", folder)
    if kind == "reward":   # its head is not among the weights: the same for all
        start = _with_score(start, os.path.join(folder, "scored"))
    plain = losses(kind, None, folder, start)
    for stage in (2, 3):
        assert training.worst(losses(kind, stage, folder, start), plain) <= matrix.LOSS_BAR, stage


def _with_score(start, path):
    import torch
    import torch.distributed as dist
    from transformers import LlamaForSequenceClassification
    if dist.get_rank() == 0:
        torch.manual_seed(0)
        LlamaForSequenceClassification.from_pretrained(start, num_labels=1, pad_token_id=0).save_pretrained(path)
    dist.barrier()
    return path
