# SPDX-License-Identifier: Apache-2.0
"""Activation checkpointing: what is held between forward and backward, and the time of a step, beside torch's and DeepSpeed's.

    python tests/bench/activation_checkpointing.py --peer-python /path/to/python/with/deepspeed [--layers 8 --width 512 --tokens 1024]

Two ranks are one model-parallel group: both run the same layers on the same inputs. Contenders run in fresh processes, in turns. Nothing is
timed before a contender's gradients are those of the layers without checkpointing, bit for bit; where they are not, how far off is printed.
Held: resident memory after forward less before it, after malloc gave back what it keeps of freed blocks.
"""
import argparse
import ctypes
import json
import os
import statistics
import sys
import time
import types

import running
import torch
import torch.distributed as dist
import torch.utils.checkpoint

WAYS = {  # name -> library
    "plain": "torch", "torch, reentrant": "torch", "torch, non-reentrant": "torch",
    "ours, reentrant": "ours", "ours, non-reentrant": "ours", "ours, reentrant, partitioned": "ours", "ours, non-reentrant, partitioned": "ours",
    "ours, reentrant, partitioned, contiguous": "ours", "ours, reentrant, cpu": "ours",
    "DeepSpeed, reentrant": "deepspeed", "DeepSpeed, non-reentrant": "deepspeed", "DeepSpeed, reentrant, partitioned": "deepspeed",
    "DeepSpeed, reentrant, partitioned, contiguous": "deepspeed",
}


def checkpoint_of(way, layers):
    """(function, *args) -> outputs."""
    if way == "plain":
        return lambda function, *args: function(*args)
    reentrant = "non-reentrant" not in way
    if way.startswith("torch"):
        return lambda function, *args: torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=reentrant)
    import deepspeed
    if way.startswith("DeepSpeed"):
        deepspeed.init_distributed("gloo")
    world, rank = dist.get_world_size(), dist.get_rank()
    mpu = types.SimpleNamespace(get_model_parallel_world_size=lambda: world, get_model_parallel_rank=lambda: rank,
                                get_model_parallel_group=lambda: dist.group.WORLD)
    contiguous = "contiguous" in way
    deepspeed.checkpointing.configure(mpu, partition_activations="partitioned" in way, contiguous_checkpointing=contiguous,
                                      num_checkpoints=layers if contiguous else None, checkpoint_in_cpu="cpu" in way)
    return deepspeed.checkpointing.checkpoint if reentrant else deepspeed.checkpointing.non_reentrant_checkpoint


def resident_bytes():
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


class Layer(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.up, self.down = torch.nn.LayerNorm(width), torch.nn.Linear(width, 4 * width), torch.nn.Linear(4 * width, width)

    def forward(self, x):
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm(x))))


def worker(args):
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    layers = torch.nn.ModuleList(Layer(args.width) for _ in range(args.layers))
    data = torch.randn(args.tokens, args.width)
    run = checkpoint_of(args.way, args.layers)

    def forward(way):
        y = data.clone().requires_grad_() * 1.0
        for layer in layers:
            y = way(layer, y)
        return y

    def gradients(way):
        layers.zero_grad()
        forward(way).square().mean().backward()
        return [p.grad.clone() for p in layers.parameters() if p.grad is not None]

    want = gradients(lambda function, *values: function(*values))
    error = 0.0
    for _ in range(2):
        error = max(error, *(float((a - b).abs().max() / b.abs().max()) for a, b in zip(gradients(run), want, strict=True)))
    if "contiguous" in args.way:
        sys.modules["deepspeed"].checkpointing.reset()  # buffers of earlier passes would not be seen
    before = resident_bytes()
    y = forward(run)
    held = resident_bytes() - before
    y.square().mean().backward()
    seconds = []
    for _ in range(args.steps):
        layers.zero_grad()
        dist.barrier()
        begin = time.perf_counter()
        forward(run).square().mean().backward()
        dist.barrier()
        seconds.append(time.perf_counter() - begin)
    if dist.get_rank() == 0:
        print("RESULT " + json.dumps({"held": held, "median_s": statistics.median(seconds), "error": error, "load": os.getloadavg()}), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def race(args):
    chosen = [way.strip() for way in args.ways.split(";")] if args.ways else list(WAYS)
    ways = [way for way in chosen if WAYS[way] != "deepspeed" or args.peer_python]
    found = {way: [] for way in ways}
    for turn in range(args.rounds):
        for way in ways:
            lib = "deepspeed" if WAYS[way] == "deepspeed" else "ours"
            argv = running.command(args, lib, "activation_checkpointing.py", [
                "--worker", f"--way={way}", *(f"--{name}={getattr(args, name)}" for name in ("layers", "width", "tokens", "steps"))])
            try:
                result = running.execute(argv, running.environment(args, lib), args.timeout)
            except running.Failed as error:
                print(f"round {turn + 1}, {way}: {str(error)[-900:]}", file=sys.stderr, flush=True)
                continue
            found[way].append(result)
            print(f"round {turn + 1}/{args.rounds} {way}: {1e3 * result['median_s']:.0f} ms, {result['held'] / 2**20:.1f} MiB held, "
                  f"load {result['load'][0]:.1f}", file=sys.stderr, flush=True)
    input_mib = args.tokens * args.width * 4 / 2**20
    print(f"{args.layers} layers of width {args.width}, {args.tokens} tokens, fp32, {args.ranks} ranks; an input is {input_mib:.1f} MiB\n")
    print("| | held, MiB | step, ms | gradients |\n|---|---|---|---|")
    for way, results in found.items():
        if not results:
            print(f"| {way} | failed | | |")
            continue
        error = max(r["error"] for r in results)
        print(f"| {way} | {statistics.median(r['held'] for r in results) / 2**20:.1f} | {1e3 * statistics.median(r['median_s'] for r in results):.0f} | "
              f"{'equal bits' if error == 0 else f'off by {error:.1e}'} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    running.add_arguments(parser, "ours:2,deepspeed:2")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--way", choices=WAYS, default="plain", help=argparse.SUPPRESS)
    parser.add_argument("--ways", help="some of them, separated by semicolons: " + "; ".join(WAYS))
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--local_rank", type=int, default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    worker(args) if args.worker else race(args)


if __name__ == "__main__":
    main()
