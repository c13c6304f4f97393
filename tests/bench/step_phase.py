# SPDX-License-Identifier: Apache-2.0
"""The step phase of ZeRO (norm, clip, update, cast, gather of the weights) alone: `engine.step()` when the gradients are ready, ours beside DeepSpeed's.

    python tests/bench/step_phase.py --peer-python /path/to/python/with/deepspeed [--ranks 1] [--stage 2] [--dtype bf16] [--model gpt-25m]

Both libraries run in fresh processes, in turns. Forward and backward run too, untimed; the losses must be those of the one-process reference before
anything is timed (train_step.py), with clipping on in both libraries and none in the reference, so the limit is one that gradients do not reach.
"""
import argparse
import json
import os
import statistics
import sys
import time

import running
import torch

CLIP = 1e6  # the norm is computed and compared, and the losses stay those of the reference


def worker(args):
    """One rank, started by torchrun: prints the slowest rank's seconds of every timed step."""
    import libraries
    import models
    import torch.distributed as dist
    import train_step

    torch.set_num_threads(1)
    library = libraries.LIBRARIES[args.lib]()
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    setup = libraries.Setup(args.model, args.stage, args.dtype, 1, args.batch, world)
    plain = library.config
    library.config = lambda setup: {**plain(setup), "gradient_clipping": CLIP}
    library.prepare(setup)
    dist.init_process_group("gloo")
    args.world_size, args.accumulation = world, 1
    reference = [train_step.read_reference(args) if rank == 0 else None]
    dist.broadcast_object_list(reference, 0)
    library.build(setup, lambda: models.build(args.model))
    model, engine, losses, seconds = models.MODELS[args.model], library.engine, [], []
    for step in range(args.checked + args.steps):
        batch = model.batch(step, 0, rank, args.batch, args.tokens)
        loss = engine(*batch)
        engine.backward(loss)
        dist.barrier()
        begin = time.perf_counter()
        engine.step()
        seconds.append(time.perf_counter() - begin)
        losses.append([float(loss.detach())])
        if step + 1 == args.checked:
            error = train_step.check(args, reference[0], losses, rank)
    ranks = [None] * world
    dist.all_gather_object(ranks, seconds[args.checked:])
    if rank == 0:
        slowest = [max(both) for both in zip(*ranks)]
        print("RESULT " + json.dumps({"median_s": statistics.median(slowest), "min_s": min(slowest), "seconds": slowest, "loss_error": error,
                                      "load": os.getloadavg()}), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def race(args):
    options = [f"--{name}={getattr(args, name)}" for name in ("model", "dtype", "stage", "batch", "tokens", "steps", "checked")]
    reference = running.make_reference(args, args.folder, [o for o in options if not o.startswith(("--stage", "--steps"))])
    seconds = {"ours": [], "deepspeed": []}
    for turn in range(args.rounds):
        for lib in seconds:
            argv = running.command(args, lib, "step_phase.py", ["--worker", "--lib", lib, "--reference", reference, *options])
            result = running.execute(argv, running.environment(args, lib), args.timeout)
            seconds[lib].append(result["median_s"])
            print(f"round {turn + 1}/{args.rounds} {lib}: {1e3 * result['median_s']:.1f} ms, load {result['load'][0]:.1f}", file=sys.stderr, flush=True)
    ours, theirs = (statistics.median(seconds[lib]) for lib in ("ours", "deepspeed"))
    print(f"step() of stage {args.stage}, {args.model} {args.dtype}, {args.ranks} rank(s): ours {ours * 1e3:.1f} ms, DeepSpeed {theirs * 1e3:.1f} ms, "
          f"{theirs / ours:.2f}x (bar {args.bar:g}: {'met' if theirs >= args.bar * ours else 'MISSED'})")


def main():
    import tempfile

    import libraries
    import models
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    running.add_arguments(parser, "ours:2,deepspeed:2")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--lib", choices=("ours", "deepspeed"), default="ours", help=argparse.SUPPRESS)
    parser.add_argument("--reference", help=argparse.SUPPRESS)
    parser.add_argument("--model", choices=models.MODELS, default="gpt-25m")
    parser.add_argument("--stage", type=int, default=2)
    parser.add_argument("--dtype", choices=libraries.DTYPES, default="bf16")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--checked", type=int, default=2)
    parser.add_argument("--bar", type=float, default=3.0)
    parser.add_argument("--local_rank", type=int, default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(args)
    if not args.peer_python:
        raise SystemExit("--peer-python: an interpreter with DeepSpeed is needed")
    with tempfile.TemporaryDirectory() as folder:
        args.folder = folder
        race(args)


if __name__ == "__main__":
    main()
