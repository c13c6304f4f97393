# SPDX-License-Identifier: Apache-2.0
"""The largest GPT that finishes three steps of training in a memory cgroup with everything on NVMe: ours beside DeepSpeed's.

    python tests/bench/largest_model.py --folder /mnt/nvme --peer-python /path/to/python/with/deepspeed [--gib 4]

One rank, bf16, AdamW, ZeRO stage 3, the model built under zero.Init. Needs root and a memory cgroup (version 1 or 2). The number of layers is doubled
while runs succeed and then halved into the gap; a run fails when the kernel ends it or it raises. Ours stops where the disk is full.
"""
import argparse
import json
import os
import shutil
import sys
import tempfile
import time

import running

TOKENS = 128


def cgroup(gib):
    """A new group with that much memory; the file that takes process ids."""
    name, limit = f"bench-{os.getpid()}", str(int(gib * 2**30))
    for root, key in (("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max")):
        folder = os.path.join(root, name)
        try:
            os.makedirs(folder, exist_ok=True)
            with open(os.path.join(folder, key), "w") as file:
                file.write(limit)
            return folder
        except OSError:
            continue
    raise SystemExit("no memory cgroup can be made here (root and /sys/fs/cgroup/memory or cgroup version 2 are needed)")


def configuration(folder, width, layers, lib):
    # Below these the peer ends with "Not enough buffers": it needs one for every large parameter.
    prefetch = 4 * width**2 if lib == "ours" else 0
    offload = {"device": "nvme", "nvme_path": folder, "pin_memory": False}
    return {"train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True}, "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
            "zero_optimization": {"stage": 3, "stage3_prefetch_bucket_size": prefetch,
                                  "stage3_max_live_parameters": 16 * width**2, "sub_group_size": 16 * width**2, "reduce_bucket_size": 4 * width**2,
                                  "offload_optimizer": {**offload, "buffer_count": 4},
                                  "offload_param": {**offload, "buffer_count": 5 if lib == "ours" else 4 * layers + 12, "buffer_size": 4 * width**2 + width, "max_in_cpu": 0}},
            "aio": {"block_size": 1 << 20, "queue_depth": 32, "single_submit": False, "overlap_events": True, "intra_op_parallelism": 1}}


def worker(args):
    with open(os.path.join(args.group, "cgroup.procs"), "w") as file:
        file.write(str(os.getpid()))
    import torch

    import deepspeed
    import models
    import resident

    torch.set_num_threads(2)
    config = configuration(args.folder, args.width, args.layers, args.lib)
    with deepspeed.zero.Init(config_dict_or_path=config):
        model = models.Gpt(args.width, args.layers)
    numel = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
    engine = deepspeed.initialize(model=model, config=config)[0]
    losses, seconds = [], []
    for step in range(3):
        tokens = torch.randint(0, 256, (1, TOKENS + 1), generator=torch.Generator().manual_seed(step))
        begin = time.perf_counter()
        loss = engine(tokens)
        engine.backward(loss)
        engine.step()
        seconds.append(time.perf_counter() - begin)
        losses.append(loss.item())
    print("RESULT " + json.dumps({"numel": numel, "losses": losses, "seconds": seconds, "peak_gb": resident.peak_rss() / 2**30}), flush=True)


def attempt(args, lib, layers):
    folder = tempfile.mkdtemp(dir=args.folder)
    argv = running.command(args, lib, "largest_model.py", ["--worker", "--lib", lib, "--folder", folder, "--layers", str(layers),
                                                           "--width", str(args.width), "--group", args.group])
    begin = time.time()
    try:
        result = running.execute(argv, running.environment(args, lib), args.timeout)
        text = (f"{result['numel'] / 1e6:.0f} M: {result['seconds'][-1]:.1f} s a step, peak resident {result['peak_gb']:.2f} GiB, "
                f"losses {', '.join(f'{x:.4f}' for x in result['losses'])}")
    except running.Failed as error:
        result, text = None, str(error).splitlines()[0]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(f"{lib}, {layers} layers: {text} ({time.time() - begin:.0f} s)", file=sys.stderr, flush=True)
    return result


def search(args, lib, first):
    good, best, bad, layers = 0, None, None, first
    while bad is None or bad - good > max(1, good // 8):
        result = attempt(args, lib, layers) if layers <= args.most_layers else None
        if result is None:
            bad = layers
        else:
            good, best = layers, result
        if bad is not None and bad <= 1:
            break
        layers = 2 * layers if bad is None else (good + bad) // 2
    return best


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    running.add_arguments(parser, "ours:3,deepspeed:3")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--group", help=argparse.SUPPRESS)
    parser.add_argument("--lib", default="ours", choices=("ours", "deepspeed"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", required=True, help="on the disk that state rests on; 18 bytes a parameter must be free there")
    parser.add_argument("--gib", type=float, default=4.0)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=8, help="of the first attempt")
    parser.add_argument("--libs", default="ours,deepspeed")
    parser.add_argument("--most-layers", type=int, default=1 << 30)
    args = parser.parse_args()
    if args.worker:
        return worker(args)
    args.ranks, args.group = 1, cgroup(args.gib)
    try:
        best = {lib: search(args, lib, args.layers) for lib in args.libs.split(",") if lib == "ours" or args.peer_python}
    finally:
        os.rmdir(args.group)
    for lib, result in best.items():
        print(f"{lib}: {result['numel'] / 1e6:.0f} M parameters in {args.gib:g} GiB" if result else f"{lib}: not even {args.layers} layers")
    if all(best.values()) and len(best) == 2:
        ratio = best["ours"]["numel"] / best["deepspeed"]["numel"]
        print(f"{ratio:.2f}x (bar 4: {'met' if ratio >= 4 else 'MISSED'})")


if __name__ == "__main__":
    main()
