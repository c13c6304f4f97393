# SPDX-License-Identifier: Apache-2.0
"""engine.step() with optimizer state in files: ours beside DeepSpeed's, beside the disk's own rate for reads and writes at once.

    python tests/bench/nvme_step.py --folder /mnt/nvme --peer-python /path/to/python/with/deepspeed [--million 300] [--parameters]

One rank, bf16, AdamW, gradients ready. All run in fresh processes, in turns. Before anything is timed ours must have the losses of ours with all
state in memory, bit for bit, and DeepSpeed's must be those to the precision of bf16. Bytes are what the kernel says the process moved to and from
the disk (/proc/self/io); the ceiling is fio reading and writing one half each, past the page cache, in blocks of 1 MiB, 32 at a time.
"""
import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

import running
import torch

WIDTH = 4096


def moved():
    with open("/proc/self/io") as file:
        values = dict(line.split(": ") for line in file)
    return int(values["read_bytes"]) + int(values["write_bytes"])


class Stack(torch.nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers))

    def forward(self, x):
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return (x.float() - 1).square().mean()


def configuration(args):
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0, "sub_group_size": WIDTH * WIDTH * 2}
    if args.lib != "memory":
        zero["offload_optimizer"] = {"device": "nvme", "nvme_path": args.folder, "buffer_count": args.buffers, "pipeline_read": args.pipeline,
                                     "pipeline_write": args.pipeline, "super_offload": args.lib == "ahead"}
        if args.parameters:
            zero["offload_param"] = {"device": "nvme", "nvme_path": args.folder, "max_in_cpu": 0, "buffer_size": WIDTH * WIDTH}
    return {"train_micro_batch_size_per_gpu": 1, "gradient_clipping": 0.0 if args.ahead else 1.0, "zero_optimization": zero,
            "bf16": {"enabled": True, **({"split_master": True} if args.split_master else {})},
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
            "aio": {"block_size": 1 << 20, "queue_depth": 32, "single_submit": False, "overlap_events": True, "intra_op_parallelism": 1}}


def worker(args):
    import deepspeed

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = Stack(max(1, round(args.million * 1e6 / WIDTH**2)))
    torch.set_default_dtype(torch.float32)
    numel = sum(p.numel() for p in model.parameters())
    engine = deepspeed.initialize(model=model, config=configuration(args))[0]
    losses, seconds, bytes_moved, phases = [], [], [], []
    for step in range(args.steps):
        x = torch.randn(args.rows, WIDTH, generator=torch.Generator().manual_seed(step)).bfloat16()
        begin = time.perf_counter()
        loss = engine(x)
        engine.backward(loss)
        phases.append(time.perf_counter() - begin)
        before, begin = moved(), time.perf_counter()
        engine.step()
        seconds.append(time.perf_counter() - begin)
        bytes_moved.append((moved() - before) / numel)
        losses.append(loss.item())
    print("RESULT " + json.dumps({"numel": numel, "losses": losses, "seconds": seconds, "bytes": bytes_moved, "rest": phases,
                                  "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, "load": os.getloadavg()}), flush=True)


def fio(folder, memory):
    """GB/s of reads and writes together."""
    argv = ["fio", "--name=mixed", f"--directory={folder}", "--rw=rw", "--rwmixread=50", "--bs=1M", "--iodepth=32", "--ioengine=io_uring",
            "--direct=1", "--size=4G", "--time_based", "--runtime=8", "--output-format=json", "--unlink=1",
            f"--iomem={memory}"]
    job = json.loads(subprocess.run(argv, check=True, capture_output=True, text=True).stdout)["jobs"][0]
    return (job["read"]["bw_bytes"] + job["write"]["bw_bytes"]) / 1e9


def check(results):
    for name, result in results.items():
        want = results["memory"]["losses"]
        exact = name in ("ours", "ahead")
        for got, expected in zip(result["losses"], want):
            if got != expected if exact else abs(got - expected) > 2**-7 * abs(expected):
                raise SystemExit(f"not timed: losses of {name} are {result['losses']}, with all state in memory {want}")


def race(args):
    libs = ["memory", "ours"] + ["ahead"] * args.ahead + ["deepspeed"] * bool(args.peer_python)
    seconds, rates = {lib: [] for lib in libs}, []
    for turn in range(args.rounds):
        results = {}
        for lib in libs:
            folder = tempfile.mkdtemp(dir=args.folder)
            options = ["--worker", "--lib", lib, "--folder", folder, f"--million={args.million}", f"--steps={args.steps}", f"--threads={args.threads}",
                       f"--buffers={args.buffers}", f"--rows={args.rows}"] + ["--ahead"] * args.ahead
            argv = running.command(args, "deepspeed" if lib == "deepspeed" else "ours", "nvme_step.py", options + ["--parameters"] * args.parameters +
                                   ["--no-pipeline"] * (not args.pipeline) + ["--split-master"] * (args.split_master and lib != "deepspeed"))
            try:
                results[lib] = running.execute(argv, running.environment(args, "deepspeed" if lib == "deepspeed" else "ours"), args.timeout)
            finally:
                shutil.rmtree(folder, ignore_errors=True)
            r = results[lib]
            seconds[lib] += r["seconds"][2:]
            print(f"round {turn + 1}/{args.rounds} {lib}: step {statistics.median(r['seconds'][2:]):.2f} s, forward and backward "
                  f"{statistics.median(r['rest'][1:]):.2f} s, {statistics.median(r['bytes'][2:]):.1f} bytes a parameter, peak resident "
                  f"{r['peak_gb']:.2f} GB, load {r['load'][0]:.1f}", file=sys.stderr, flush=True)
        check(results)
        rates.append(fio(args.folder, args.fio_memory))
        print(f"round {turn + 1}/{args.rounds} fio: {rates[-1]:.2f} GB/s", file=sys.stderr, flush=True)
    numel, ours, disk = results["ours"]["numel"], statistics.median(seconds["ours"]), statistics.median(rates)
    each = 20 if args.split_master else 24
    rate = each * numel / ours / 1e9
    print(f"step of {numel / 1e6:.0f} M parameters, {args.threads} thread(s): {ours:.2f} s, {rate:.2f} GB/s of {each} bytes a parameter; fio {disk:.2f} GB/s: "
          f"{rate / disk:.2f} (bar 0.9: {'met' if rate >= 0.9 * disk else 'MISSED'}); all in memory {statistics.median(seconds['memory']):.2f} s")
    if args.peer_python:
        theirs = statistics.median(seconds["deepspeed"])
        print(f"DeepSpeed {theirs:.2f} s: {theirs / ours:.2f}x (bar 1.5: {'met' if theirs >= 1.5 * ours else 'MISSED'})")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    running.add_arguments(parser, "ours:3,deepspeed:3")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--lib", default="ours", help=argparse.SUPPRESS)
    parser.add_argument("--folder", required=True, help="on the disk to measure")
    parser.add_argument("--million", type=float, default=300)
    parser.add_argument("--rows", type=int, default=1, help="of a batch: how much backward has to compute")
    parser.add_argument("--ahead", action="store_true", help="also with super_offload; nobody clips then")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--fio-memory", default="malloc", help="fio's --iomem; shmhuge, the like of our buffers, needs sysctl vm.nr_hugepages=100")
    parser.add_argument("--buffers", type=int, default=4, help="buffer_count; the peer's pipeline needs more than 4")
    parser.add_argument("--no-pipeline", dest="pipeline", action="store_false", help="pipeline_read and pipeline_write off (the peer's; ours always overlaps)")
    parser.add_argument("--parameters", action="store_true", help="parameters rest in files too")
    parser.add_argument("--split-master", action="store_true", help="ours with bf16.split_master")
    args = parser.parse_args()
    if args.worker:
        return worker(args)
    args.ranks = 1
    race(args)


if __name__ == "__main__":
    main()
