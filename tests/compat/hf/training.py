# SPDX-License-Identifier: Apache-2.0
"""One tiny model trained by the Hugging Face Trainer, with this library and without it. Runs on every rank of an initialised group."""
import gc
import os
import shutil
from typing import NamedTuple

from tests.compat.hf import models

STEPS = 20
SAMPLES_A_STEP = 4       # over all ranks


class Outcome(NamedTuple):
    losses: list
    norms: list
    eval_loss: float
    logits: object         # numpy, of the evaluation samples after training
    reloaded: object       # the same from what was saved, read without this library
    skipped: int           # steps whose gradients overflowed


def config(stage, **sections):
    """A configuration as people write it for the Trainer: everything it can fill in is "auto"."""
    section = {"stage": stage, "reduce_bucket_size": "auto"}
    if stage == 3:
        section.update(stage3_prefetch_bucket_size="auto", stage3_param_persistence_threshold="auto",
                       stage3_gather_16bit_weights_on_model_save=True)
    return {"zero_optimization": section, "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto",
            "train_batch_size": "auto", "gradient_clipping": "auto", "bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto"}, **sections}


def forget_accelerate():
    """The next TrainingArguments starts from nothing, as in a process of its own."""
    from accelerate.state import AcceleratorState, GradientState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config
    unset_hf_deepspeed_config()
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    for name in [name for name in os.environ if name.startswith(("ACCELERATE_", "DEEPSPEED_"))]:
        del os.environ[name]
    gc.collect()


def arguments(folder, stage=None, ds_config=None, kind=None, **settings):
    """kind: TrainingArguments or a class derived from it. stage None and no ds_config: without this library."""
    from transformers import TrainingArguments
    forget_accelerate()
    if stage is not None and ds_config is None:
        ds_config = config(stage)
    if stage is None and ds_config is None:
        settings.setdefault("ddp_find_unused_parameters", False)   # what plain Trainer otherwise gets wrong with reentrant checkpointing
    defaults = dict(per_device_train_batch_size=2, per_device_eval_batch_size=2, max_steps=STEPS, logging_steps=1, use_cpu=True, report_to=[],
                    save_strategy="no", seed=3, learning_rate=1e-3, disable_tqdm=True, bf16=False, log_level="error")
    return (kind or TrainingArguments)(output_dir=str(folder), deepspeed=ds_config, **{**defaults, **settings})


def with_lora(model):
    import torch
    from peft import LoraConfig, get_peft_model
    torch.manual_seed(5)
    return get_peft_model(model, LoraConfig(r=3, lora_alpha=6, target_modules="all-linear", lora_dropout=0.0))


def starting_point(name, folder):
    """Collective. Weights that all runs of an architecture start from, written by plain transformers."""
    import torch.distributed as dist
    forget_accelerate()
    path = os.path.join(folder, name)
    if dist.get_rank() == 0 and not os.path.exists(path):
        models.build(name).save_pretrained(path)
    dist.barrier()
    return path


def logits_of(predictions):
    """The logits among a model's outputs: the first array with a row for every sample (a router's loss has none)."""
    if isinstance(predictions, (tuple, list)):
        predictions = next(array for array in predictions if getattr(array, "ndim", 0) > 1)
    return predictions


def reload_logits(name, start, saved, lora, rows):
    """Logits of the saved weights, computed by plain transformers."""
    import torch
    from transformers.data.data_collator import default_data_collator
    forget_accelerate()
    if lora:
        from peft import PeftModel
        model = PeftModel.from_pretrained(models.model_class(name).from_pretrained(start), saved)
    else:
        model = models.model_class(name).from_pretrained(saved)
    model.eval()
    parts = []
    with torch.no_grad():
        for begin in range(0, len(rows), 2):
            parts.append(model(**default_data_collator(rows[begin:begin + 2])).logits)
    return torch.cat(parts).float().numpy()


def train(name, folder, stage=None, lora=False, save=True, dtype=None, prepare=None, samples=STEPS * SAMPLES_A_STEP, **settings):
    """Collective. Trains one architecture for some steps; stage None: without this library."""
    import torch
    import torch.distributed as dist
    from transformers import Trainer
    start = starting_point(name, folder)
    args = arguments(os.path.join(folder, "out"), stage, **settings)
    model = models.model_class(name).from_pretrained(start, **({"dtype": dtype} if dtype else {}))
    if lora:
        model = with_lora(model)
    if prepare is not None:
        prepare(model)
    rows, held_out = models.dataset(name, samples), models.dataset(name, 8, seed=2)
    trainer = Trainer(model=model, args=args, train_dataset=rows, eval_dataset=held_out)
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    predictions = trainer.predict(held_out)
    logits = logits_of(predictions.predictions)
    reloaded, skipped = None, getattr(trainer.model_wrapped, "skipped_steps", 0)
    if save:
        saved = os.path.join(folder, f"{name}-{stage}-{lora}")
        trainer.save_model(saved)
        dist.barrier()
        del trainer, model
        reloaded = reload_logits(name, start, saved, lora, held_out)
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(saved)
    torch.manual_seed(0)
    return Outcome([entry["loss"] for entry in history], [float(entry["grad_norm"]) for entry in history],
                   predictions.metrics["test_loss"], logits, reloaded, skipped)


def worst(found, wanted):
    """The largest relative difference of two lists of numbers."""
    if len(found) != len(wanted):
        return float("inf")
    return max(abs(a - b) / max(abs(b), 1e-12) for a, b in zip(found, wanted))
