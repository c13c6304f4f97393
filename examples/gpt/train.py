# SPDX-License-Identifier: Apache-2.0
"""Train a byte-level GPT on the source text of Python's standard library.

    deepspeed --num_gpus 2 examples/gpt/train.py --deepspeed configs/zero3.json
"""

import argparse
import math
import resource
import time

import deepspeed
import torch
from deepspeed import comm
from deepspeed.utils import RepeatingLoader
from tqdm import tqdm

from data import Windows, text, unigram_entropy
from model import GPT, GPTConfig

BITS = 1 / math.log(2)  # from nats


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], conflict_handler="resolve")
    deepspeed.add_config_arguments(parser)
    # Both spellings work: --deepspeed FILE, and --deepspeed --deepspeed_config FILE.
    parser.add_argument("--deepspeed", nargs="?", const=None, metavar="CONFIG", help="configuration file")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the launcher")
    parser.add_argument("--steps", type=int, help="updates (default: what the schedule in the configuration says)")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=7)
    parser.add_argument("--width", type=int, default=448)
    parser.add_argument("--context", type=int, default=128, help="bytes in a window of text")
    parser.add_argument("--eval-every", type=int, default=100, help="updates between validations")
    parser.add_argument("--eval-windows", type=int, default=64, help="windows of the validation text to look at")
    parser.add_argument("--sample", type=int, default=300, help="bytes to generate at the end")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", default="loss.png", help="where to draw the loss")
    args = parser.parse_args()
    args.config = args.deepspeed_config or args.deepspeed
    if args.config is None:
        parser.error("give the configuration: --deepspeed FILE")
    return args


def memory_gb(device):
    """Peak memory of this rank: the GPU's, or else the process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


@torch.no_grad()
def validate(engine, windows, count):
    """Bits per byte over evenly spaced windows, shared out among the ranks."""
    rank, world = comm.get_rank(), comm.get_world_size()
    batch = engine.train_micro_batch_size_per_gpu()
    per_rank = max(1, count // (world * batch)) * batch  # a forward is collective: the same number on every rank
    stride = len(windows) // (per_rank * world)
    chosen = [windows[(i * world + rank) * stride] for i in range(per_rank)]
    engine.eval()
    total = torch.zeros((), device=engine.device)
    for start in range(0, per_rank, batch):
        tokens, targets = (torch.stack(part).to(engine.device) for part in zip(*chosen[start:start + batch]))
        total += engine(tokens, targets).float()
    engine.train()
    comm.all_reduce(total)
    return total.item() / (per_rank // batch * world) * BITS


@torch.no_grad()
def generate(engine, prompt, count, context, seed):
    """Continue a prompt byte by byte. Every rank calls this and draws the same bytes, for the same reason."""
    generator = torch.Generator().manual_seed(seed)
    engine.eval()
    tokens = torch.tensor([list(prompt)])
    for _ in range(count):
        logits = engine(tokens[:, -context:].to(engine.device))[0, -1].float().cpu()
        weights = torch.softmax(logits / 0.7, dim=-1)
        tokens = torch.cat([tokens, torch.multinomial(weights, 1, generator=generator)[None]], dim=1)
    return bytes(tokens[0].tolist()).decode(errors="replace")


def plot(path, losses, validations, entropy):
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("matplotlib is not installed: no picture of the loss")
        return
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(range(1, len(losses) + 1), losses, linewidth=0.6, color="0.6", label="training")
    axes.plot(*zip(*validations), marker="o", markersize=3, label="validation")
    axes.axhline(entropy, linestyle="--", color="0.3", label="unigram entropy")
    axes.set(xlabel="update", ylabel="bits per byte", ylim=(0, None))
    axes.legend()
    figure.savefig(path, dpi=150)
    print(f"the loss is drawn in {path}")


def train(engine, loader, validation, steps, args):
    """Returns the training losses and the (update, validation loss) pairs, in bits per byte."""
    rank, world = comm.get_rank(), comm.get_world_size()
    losses, validations = [], [(0, validate(engine, validation, args.eval_windows))]
    tokens_seen, busy_s = 0, 0.0
    with tqdm(total=steps, disable=rank != 0, unit="step", dynamic_ncols=True) as bar:
        while engine.global_steps < steps:
            begun, before = time.perf_counter(), engine.global_steps
            tokens, targets = (part.to(engine.device) for part in next(loader))
            loss = engine(tokens, targets)
            engine.backward(loss)
            engine.step()
            losses.append(loss.item() * BITS)
            tokens_seen += tokens.numel() * world
            busy_s += time.perf_counter() - begun
            if engine.global_steps == before:  # a micro-batch in the middle of an accumulated update
                continue
            bar.update()
            bar.set_postfix_str(f"{losses[-1]:.2f} bits/byte, {tokens_seen / busy_s:.0f} tokens/s, "
                                f"{memory_gb(engine.device):.2f} GB")
            if engine.global_steps % args.eval_every == 0 or engine.global_steps == steps:
                validations.append((engine.global_steps, validate(engine, validation, args.eval_windows)))
                if rank == 0:
                    bar.write(f"update {validations[-1][0]}: validation {validations[-1][1]:.3f} bits per byte")
    return losses, validations


def main():
    args = arguments()
    deepspeed.init_distributed()
    torch.manual_seed(args.seed)
    model = GPT(GPTConfig(layers=args.layers, heads=args.heads, width=args.width))
    numel = sum(parameter.numel() for parameter in model.parameters())
    engine, _, loader, schedule = deepspeed.initialize(model=model,
                                                       model_parameters=model.parameters(),
                                                       training_data=Windows(text("train"), args.context),
                                                       config=args.config)
    steps = args.steps or getattr(schedule, "total_num_steps", 1000)
    rank = comm.get_rank()
    entropy = unigram_entropy(text("train"))
    if rank == 0:
        print(f"{numel / 1e6:.1f} M parameters, ZeRO stage {engine.zero_optimization_stage()}, "
              f"{comm.get_world_size()} ranks on {engine.device.type}; {len(text('train')) / 1e6:.1f} MB of text "
              f"with a unigram entropy of {entropy:.2f} bits per byte")
    begun = time.perf_counter()
    losses, validations = train(engine, RepeatingLoader(loader), Windows(text("validation"), args.context), steps, args)
    minutes = (time.perf_counter() - begun) / 60
    sample = generate(engine, b"def ", args.sample, args.context, args.seed)
    if rank == 0:
        print(f"trained {steps} updates in {minutes:.1f} minutes: validation {validations[-1][1]:.3f} bits per byte, "
              f"unigram entropy {entropy:.3f}")
        plot(args.plot, losses, validations, entropy)
        print(f"a sample:\n{sample}")


if __name__ == "__main__":
    main()
