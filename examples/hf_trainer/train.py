# SPDX-License-Identifier: Apache-2.0
"""A small Llama from scratch, trained by the Hugging Face Trainer to continue arithmetic sequences. Nothing is downloaded.

    deepspeed --num_gpus 2 examples/hf_trainer/train.py --deepspeed examples/hf_trainer/ds_config.json --output_dir out

Every argument of TrainingArguments may be given. Without --deepspeed the same script is plain Trainer.
"""
import torch
from transformers import HfArgumentParser, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

NUMBERS = 128
LENGTH = 16


def samples(count, seed):
    """Sequences a, a + d, a + 2d, ... modulo NUMBERS."""
    generator = torch.Generator().manual_seed(seed)
    start, step = torch.randint(NUMBERS, (2, count), generator=generator)
    ids = (start[:, None] + step[:, None] * torch.arange(LENGTH)) % NUMBERS
    return [{"input_ids": row, "labels": row} for row in ids]


def main():
    args, = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()
    torch.manual_seed(args.seed)
    config = LlamaConfig(vocab_size=NUMBERS, hidden_size=128, intermediate_size=352, num_hidden_layers=4, num_attention_heads=4,
                         max_position_embeddings=LENGTH)
    trainer = Trainer(model=LlamaForCausalLM(config), args=args, train_dataset=samples(4096, seed=1), eval_dataset=samples(256, seed=2))
    trainer.train()
    figures = trainer.evaluate()
    if trainer.is_world_process_zero():
        print(f"eval_loss {figures['eval_loss']:.4f}")
    trainer.save_model()


if __name__ == "__main__":
    main()
