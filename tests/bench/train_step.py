# SPDX-License-Identifier: Apache-2.0
"""Times one training step of one library. Started by torchrun (or by the `deepspeed` command), one thread a rank:

    OMP_NUM_THREADS=1 python -m torch.distributed.run --standalone --nproc_per_node 2 tests/bench/train_step.py --lib ddp
    python tests/bench/train_step.py --write-reference reference.json --model gpt-25m        # one process, plain torch

Rank 0 prints one line of JSON. Nothing is timed before the losses of the first --checked steps agree with the one-process loop,
whose file is --reference (made on the spot by a child process when it is not given). See docs/benchmarks/README.md.
"""
import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import libraries
import models
import resident
import torch
import torch.distributed as dist

FP32_RELATIVE = 1e-5  # the bar of parity in fp32: about 170 units in the last place of a mean over tokens
ROOT = Path(__file__).resolve().parent.parent.parent


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lib", choices=libraries.LIBRARIES, default="ours")
    parser.add_argument("--stage", type=int, default=0)
    parser.add_argument("--dtype", choices=libraries.DTYPES, default="fp32")
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--model", choices=models.MODELS, default="gpt-25m")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--steps", type=int, default=10, help="timed steps, after the checked ones")
    parser.add_argument("--checked", type=int, default=5, help="steps whose losses must agree before anything is timed")
    parser.add_argument("--world-size", type=int, default=2, help="ranks the reference is computed for")
    parser.add_argument("--reference", help="file written by --write-reference with the same model and sizes")
    parser.add_argument("--write-reference", help="run the one-process loop and write its losses here")
    parser.add_argument("--activations", action="store_true", help="only measure one forward's memory, in one process")
    parser.add_argument("--nvme", default="", help="folder of files in which state rests (ours and DeepSpeed)")
    parser.add_argument("--pid-file", help="folder where each rank leaves its process id before it builds the model")
    parser.add_argument("--local_rank", type=int, default=None, help="given by launchers; the environment is used")
    return parser.parse_args()


def key(args):
    return [args.model, args.dtype, args.accumulation, args.tokens, args.batch, args.world_size, args.checked]


# ---------------------------------------------------------------------------------------------------- the reference


def _reference_loop():
    """tests/parity/reference_loop.py, by path: the repository root must not be importable where the peer's package is meant."""
    spec = importlib.util.spec_from_file_location("reference_loop", ROOT / "tests" / "parity" / "reference_loop.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.reference_loop


class _Case:
    def __init__(self, args):
        self.args = args

    def build(self):
        return models.build(self.args.model)

    def batch(self, step, micro, rank):
        return models.MODELS[self.args.model].batch(step, micro, rank, self.args.batch, self.args.tokens)


def write_reference(args):
    """fp32: within 1e-5 of plain torch. bf16, fp16: within twice the error plain torch has at that dtype against float64."""
    loop = _reference_loop()

    def run(dtype):
        scale = libraries.LOSS_SCALE if dtype == torch.float16 else 1.0
        options = {"optimizer": lambda p: torch.optim.AdamW(p, **libraries.ADAMW), "dtype": dtype, "loss_scale": scale}
        return loop(_Case(args), args.world_size, args.checked, args.accumulation, **options).losses

    losses = run(libraries.DTYPES[args.dtype])
    if args.dtype == "fp32":
        tolerance = FP32_RELATIVE * losses.abs().max().item()
    else:
        truth = run(torch.float64)
        tolerance = 2 * (losses - truth).abs().max().item()
        losses = truth
    Path(args.write_reference).write_text(json.dumps({"key": key(args), "losses": losses.tolist(), "tolerance": tolerance}))


def read_reference(args):
    if args.reference is None:
        path = os.path.join(tempfile.mkdtemp(), "reference.json")
        command = [sys.executable, __file__, "--write-reference", path]
        for name in ("model", "dtype", "accumulation", "tokens", "batch", "world_size", "checked"):
            command += ["--" + name.replace("_", "-"), str(getattr(args, name))]
        subprocess.run(command, check=True)
        args.reference = path
    reference = json.loads(Path(args.reference).read_text())
    if reference["key"] != key(args):
        raise SystemExit(f"{args.reference} is for {reference['key']}, this run is {key(args)}")
    return reference


# ------------------------------------------------------------------------------------------------------- the timing


def one_step(library, args, step, rank):
    model = models.MODELS[args.model]
    batches = [model.batch(step, micro, rank, args.batch, args.tokens) for micro in range(args.accumulation)]
    dist.barrier()  # a step begins on all ranks at once; data is not part of it
    begin, cpu_begin = time.perf_counter(), time.process_time()
    losses = [library.micro_step(batch, micro == args.accumulation - 1) for micro, batch in enumerate(batches)]
    losses = [float(loss.detach()) for loss in losses]
    return time.perf_counter() - begin, losses, time.process_time() - cpu_begin


def check(args, reference, losses, rank):
    """The bare loop trains each rank alone, so only its first losses can equal the reference's."""
    want = torch.tensor(reference["losses"], dtype=torch.float64)[:, :, rank]
    got = torch.tensor(losses, dtype=torch.float64)
    steps = 1 if args.lib == "loop" else args.checked
    worst = torch.nan_to_num((got - want)[:steps].abs(), nan=float("inf")).max().item()
    verdicts = [None] * dist.get_world_size()
    dist.all_gather_object(verdicts, worst)
    if max(verdicts) > reference["tolerance"]:
        raise SystemExit(
            f"not timed: {args.lib} stage {args.stage} {args.dtype}: losses are off by {max(verdicts):.3g}, allowed {reference['tolerance']:.3g}\n"
            f"wanted {want.tolist()}\ngot    {got.tolist()}"
        )
    return max(verdicts)


def toy_step():
    """Touches torch's code and workspaces (some 100 MB of pages and threads), which are no library's own, before memory is counted."""
    model = models.Gpt(64, 1)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True, **libraries.ADAMW)
    model(torch.zeros(1, 17, dtype=torch.long)).backward()
    optimizer.step()


def measure(args):
    rank = int(os.environ["RANK"])
    torch.set_num_threads(1)
    library = libraries.LIBRARIES[args.lib]()
    setup = libraries.Setup(args.model, args.stage, args.dtype, args.accumulation, args.batch, int(os.environ["WORLD_SIZE"]),
                            args.nvme)
    args.world_size = setup.world_size
    library.prepare(setup)
    if args.lib == "deepspeed" and Path(library.file).is_relative_to(ROOT):
        raise SystemExit(f"--lib deepspeed means the peer, but `import deepspeed` gave {library.file}")
    dist.init_process_group("gloo")
    reference = [read_reference(args) if rank == 0 else None]
    dist.broadcast_object_list(reference, 0)
    reference = reference[0]
    toy_step()
    dist.all_reduce(torch.zeros(1))
    resident.reset_peak()
    base = resident.rss()
    if args.pid_file:
        Path(args.pid_file, str(rank)).write_text(json.dumps({"pid": os.getpid(), "pss": resident.pss()}))
    begin = time.perf_counter()
    library.build(setup, lambda: models.build(args.model))
    build_s = time.perf_counter() - begin
    losses = [one_step(library, args, step, rank)[1] for step in range(args.checked)]
    error = check(args, reference, losses, rank)
    timed = [one_step(library, args, args.checked + step, rank) for step in range(args.steps)]
    losses += [loss for _, loss, _ in timed]
    report(args, library, {
        "rank": rank, "seconds": [t for t, _, _ in timed], "cpu_s": [c for _, _, c in timed], "build_s": build_s,
        "base_rss_bytes": base, "end_pss_bytes": resident.pss(),
        "peak_over_imports_bytes": resident.peak_rss() - base, "loss_error": error, "losses": losses,
    })


def report(args, library, mine):
    ranks = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, mine)
    if mine["rank"] == 0:
        # A step is over when the slower rank is done.
        seconds = [max(both) for both in zip(*(r["seconds"] for r in ranks))]
        result = {
            "lib": args.lib, "stage": args.stage, "dtype": args.dtype, "accumulation": args.accumulation, "model": args.model,
            "tokens": args.tokens, "batch": args.batch, "world_size": len(ranks), "torch": torch.__version__,
            "version": getattr(library, "version", torch.__version__),
            "median_s": statistics.median(seconds) if seconds else None, "min_s": min(seconds, default=None),
            "cpu_s": statistics.median(c for r in ranks for c in r["cpu_s"]) if seconds else None, "steps": len(seconds),
            "loss_error": mine["loss_error"], "build_s": mine["build_s"], "load": os.getloadavg(),
            "peak_over_imports_bytes": [r["peak_over_imports_bytes"] for r in ranks],
            "end_pss_bytes": [r["end_pss_bytes"] for r in ranks], "base_rss_bytes": [r["base_rss_bytes"] for r in ranks],
            "losses": mine["losses"],
        }
        print("RESULT " + json.dumps(result), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def activations(args):
    """Peak of one forward over the memory before it, in plain torch: what autograd keeps plus the kernels' workspaces. A toy model
    goes first, so that torch's own code is not counted. Autograd's share alone is counted through its saved tensors."""
    torch.set_num_threads(1)
    toy_step()
    model = models.build(args.model).to(libraries.DTYPES[args.dtype])
    numel = sum(p.numel() for p in model.parameters())
    saved = {}

    def note(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    batch = models.MODELS[args.model].batch(0, 0, 0, args.batch, args.tokens)
    base = resident.rss()
    resident.reset_peak()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = model(*batch)
    peak = resident.peak_rss() - base
    kept = sum(size for pointer, size in saved.items() if pointer not in parameters)
    print("RESULT " + json.dumps({"numel": numel, "activations_bytes": peak, "saved_bytes": kept, "loss": loss.item(),
                                  "unit_numel": models.MODELS[args.model].unit_numel}))


def main():
    args = arguments()
    if args.write_reference:
        write_reference(args)
    elif args.activations:
        activations(args)
    else:
        measure(args)


if __name__ == "__main__":
    main()
