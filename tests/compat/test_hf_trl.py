# SPDX-License-Identifier: Apache-2.0
"""TRL's trainers beside themselves without this library, on a tiny model with a tokenizer made on the spot."""
import importlib.util
import os
import tempfile
from typing import NamedTuple

import pytest

from tests.parity.launch import on_ranks

for _package in ("transformers", "accelerate", "trl", "datasets", "peft"):
    if importlib.util.find_spec(_package) is None:
        pytest.skip(f"{_package} is not installed", allow_module_level=True)

from tests.compat.hf import matrix, models, training  # noqa: E402

BF16_BAR = 2**-8

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


def _rows(kind, folder):
    """On disk, where all ranks find what one of them caches beside it: DPO computes its reference once and reads it everywhere."""
    import torch.distributed as dist
    from datasets import Dataset, load_from_disk
    path = os.path.join(folder, kind)
    if dist.get_rank() == 0 and not os.path.exists(path):
        made = {"text": lambda row: {"text": text(row, 8)}, "prompts": lambda row: {"prompt": text(row, 3 + row % 3)},
                "scored": lambda row: {"chosen": text(row + 3, 5), "rejected": text(row + 5, 6)},
                "pairs": lambda row: {"prompt": text(row, 4), "chosen": " " + text(row + 3, 5), "rejected": " " + text(row + 5, 5)}}[kind]
        Dataset.from_list([made(row) for row in range(16)]).save_to_disk(path)
    dist.barrier()
    return load_from_disk(path)


def _lora():
    from peft import LoraConfig
    return LoraConfig(r=3, lora_alpha=6, target_modules="all-linear", lora_dropout=0.0)


def _reward_of(completions, **_):
    return [len(completion) % 7 + 0.5 * (len(set(completion.split())) % 3) for completion in completions]


class Case(NamedTuple):
    trainer: str      # of TRL
    rows: str
    settings: dict
    lora: bool = False


_ONLINE = dict(per_device_train_batch_size=4, num_generations=4, max_completion_length=8, max_steps=3)
CASES = {
    "SFT": Case("SFT", "text", dict(max_length=16)),
    "SFT, packed, checkpointing": Case("SFT", "text", dict(max_length=16, packing=True, gradient_checkpointing=True)),
    "SFT, LoRA, checkpointing": Case("SFT", "text", dict(max_length=16, gradient_checkpointing=True), lora=True),
    "DPO": Case("DPO", "pairs", dict(max_length=24)),
    "DPO, LoRA": Case("DPO", "pairs", dict(max_length=24), lora=True),
    "DPO, reference beforehand": Case("DPO", "pairs", dict(max_length=24, precompute_ref_log_probs=True)),
    "DPO, reference follows": Case("DPO", "pairs", dict(max_length=24, sync_ref_model=True, ref_model_sync_steps=1)),
    "reward": Case("Reward", "scored", dict(max_length=24)),
    "GRPO": Case("GRPO", "prompts", _ONLINE),
    "GRPO, reference follows": Case("GRPO", "prompts", dict(_ONLINE, beta=0.1, sync_ref_model=True, ref_model_sync_steps=1)),
    "GRPO, LoRA": Case("GRPO", "prompts", dict(_ONLINE, beta=0.1), lora=True),
    "GRPO, generation on shards": Case("GRPO", "prompts", dict(_ONLINE, ds3_gather_for_generation=False, disable_dropout=True,
                                                                 gradient_checkpointing=True)),
    "GRPO, two updates a generation": Case("GRPO", "prompts", dict(_ONLINE, num_iterations=2, beta=0.1)),
    "RLOO": Case("RLOO", "prompts", _ONLINE),
}


def history(name, stage, folder, start, **more):
    """Loss and gradient norm of every step, and for generating trainers how long the completions were."""
    import torch
    import trl
    training.forget_accelerate()
    torch.manual_seed(0)
    case = CASES[name]
    out = tempfile.mkdtemp(prefix="out-", dir=folder)
    args = getattr(trl, case.trainer + "Config")(output_dir=out, deepspeed=None if stage is None else training.config(stage),
                                                 **{**_COMMON, **case.settings, **more})
    kind = models.model_class("llama")
    extra = {"peft_config": _lora()} if case.lora else {}
    if case.trainer == "Reward":
        from transformers import LlamaForSequenceClassification as kind
    if case.trainer in ("GRPO", "RLOO"):
        extra["reward_funcs"] = _reward_of
    trainer = getattr(trl, case.trainer + "Trainer")(model=kind.from_pretrained(start), args=args, processing_class=tokenizer(),
                                                     train_dataset=_rows(case.rows, folder), **extra)
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    return [value for entry in entries for value in (entry["loss"], float(entry["grad_norm"]), entry.get("completions/mean_length", 1.0))]


@pytest.fixture
def folder():
    with tempfile.TemporaryDirectory(prefix="hf-") as path:
        yield path


def _worst(found, plain):
    """Relative, but for losses that are zero up to rounding (advantages cancel): those of one step count by its gradient norm."""
    assert len(found) == len(plain)
    scale = max(map(abs, plain))
    return max(abs(a - b) / max(abs(b), 0.01 * scale) for a, b in zip(found, plain))


@on_ranks(2, timeout=170)
@pytest.mark.parametrize("name", CASES)
def test_losses_norms_and_completions(name, folder):
    start = training.starting_point("llama", folder)
    if name == "reward":   # its head is not among the weights: the same for all
        start = _with_score(start, os.path.join(folder, "with-head"))
    plain = history(name, None, folder, start)
    assert len(plain) >= 9
    for stage in (2, 3):
        assert _worst(history(name, stage, folder, start), plain) <= matrix.LOSS_BAR, stage


class _Completions:
    """Context. The first time through, keeps what a trainer samples; from then on its trainers get that in place of samples of their own."""

    def __init__(self, name):
        import trl
        self._kind = getattr(trl, CASES[name].trainer + "Trainer")
        self._kept, self._replays = [], False

    def __enter__(self):
        self._number, self._generate = 0, getattr(self._kind, "_generate_single_turn", None)
        if self._generate is not None:
            self._kind._generate_single_turn = lambda trainer, *args, **settings: self._turn(trainer, *args, **settings)

    def _turn(self, trainer, *args, **settings):
        self._number += 1
        if not self._replays:
            self._kept.append(self._generate(trainer, *args, **settings))
        return self._kept[self._number - 1]

    def __exit__(self, *_):
        if self._generate is not None:
            self._kind._generate_single_turn = self._generate
            assert self._number == len(self._kept) > 0
        self._replays = True


@on_ranks(2, timeout=170)
@pytest.mark.parametrize("name", ["DPO, reference beforehand", "GRPO", "GRPO, two updates a generation", "RLOO"])
def test_bf16(name, folder):
    """Plain TRL keeps fp32 weights under autocast; here weights and reference are bf16.

    It also generates from the fp32 weights. Of 26 tokens sampled from bf16 logits by the same random numbers one is another, and with it
    the completions and their rewards: all runs train on the completions of the first.
    """
    start, completions = training.starting_point("llama", folder), _Completions(name)
    with completions:
        plain = history(name, None, folder, start, bf16=True)
    for stage in (2, 3):   # what is averaged, advantages and log-probabilities, has the size of 1 and is rounded by 2**-9 a few times
        with completions:
            found = history(name, stage, folder, start, bf16=True)
        assert max(abs(a - b) / max(1.0, abs(b)) for a, b in zip(found, plain, strict=True)) <= BF16_BAR, stage


def _with_score(start, path):
    import torch
    import torch.distributed as dist
    from transformers import LlamaForSequenceClassification
    if dist.get_rank() == 0:
        torch.manual_seed(0)
        LlamaForSequenceClassification.from_pretrained(start, num_labels=1, pad_token_id=0).save_pretrained(path)
    dist.barrier()
    return path
