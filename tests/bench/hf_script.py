# SPDX-License-Identifier: Apache-2.0
"""An ordinary Trainer script: a Llama of width 256 with 8 layers, from scratch, on random tokens. What trains it is up to the command line:

    torchrun --nproc-per-node 2 tests/bench/hf_script.py --use_cpu --max_steps 20 --output_dir out                       # DDP
    torchrun --nproc-per-node 2 tests/bench/hf_script.py --use_cpu --max_steps 20 --output_dir out --deepspeed cfg.json  # a deepspeed

A callback, the one thing that an everyday script lacks, notes when steps end and what the process occupies; rank 0 prints one line of JSON.
"""
import json
import os
import statistics
import sys
import time

import resident
import torch
import torch.distributed as dist
from transformers import HfArgumentParser, LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

WARM_UP = 3
VOCABULARY, LENGTH = 4096, 128
LAUNCHED = float(os.environ.get("BENCH_LAUNCHED_AT", 0)) or time.time()


def samples(count):
    ids = torch.randint(VOCABULARY, (count, LENGTH), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in ids]


class Notes(TrainerCallback):
    def __init__(self):
        self.ends, self.losses = [], []

    def on_train_begin(self, args, state, control, **kwargs):
        self.begin = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.ends.append(time.perf_counter())

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.losses.append(float(logs["loss"]))


def result(notes, imports_bytes):
    """Of the slower or larger rank. Collective."""
    steps = [b - a for a, b in zip(notes.ends, notes.ends[1:])][WARM_UP:]
    mine = {"median_s": statistics.median(steps), "train_s": notes.ends[-1] - notes.begin, "total_s": time.time() - LAUNCHED,
            "peak_bytes": resident.peak_rss(), "peak_over_imports_bytes": resident.peak_rss() - imports_bytes}
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return {**{key: max(rank[key] for rank in everyone) for key in mine}, "losses": notes.losses, "load": os.getloadavg()}


def main():
    args, = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()
    imports_bytes = resident.rss()
    resident.reset_peak()
    torch.manual_seed(args.seed)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, hidden_size=256, intermediate_size=688, num_hidden_layers=8,
                                         num_attention_heads=8, max_position_embeddings=LENGTH))
    notes = Notes()
    rows = samples(args.max_steps * args.per_device_train_batch_size * dist.get_world_size())
    Trainer(model=model, args=args, train_dataset=rows, callbacks=[notes]).train()
    found = result(notes, imports_bytes)
    if dist.get_rank() == 0:
        print("RESULT", json.dumps({**found, "deepspeed": getattr(sys.modules.get("deepspeed"), "__version__", None)}), flush=True)


if __name__ == "__main__":
    main()
