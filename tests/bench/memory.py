# SPDX-License-Identifier: Apache-2.0
"""Peak resident memory of training a 300 M GPT in fp32, over what the imports hold, beside what the formula allows.

    python tests/bench/memory.py --peer-python PEER/bin/python --out memory.json

Allowed, for Ψ parameters on N ranks, in bytes: stage 3: 16Ψ/N + two units + activations; stages 1 and 2: 4Ψ + 12Ψ/N + two buckets
+ activations, where a bucket is given the size of a unit; the largest unit is one transformer block. Activations: the peak of one
forward of the same batch in plain torch over the memory before it. The bar is 1.1 times that, for the peak (VmHWM) of the worse rank.
"""
import argparse
import json
import os
import statistics
import tempfile
from pathlib import Path

import models
import resident
import running

CONTENDERS = "ours:1,ours:2,ours:3,ddp,fsdp2,deepspeed:1,deepspeed:2,deepspeed:3"
SLACK = 1.1
MIB = 2**20


def allowed_bytes(stage, numel, unit_numel, activations_bytes, ranks):
    whole = 0 if stage == 3 else 4 * numel
    shared = 16 if stage == 3 else 12
    return whole + shared * numel / ranks + 2 * 4 * unit_numel + activations_bytes


class PssWatch:
    """Samples the ranks' proportional memory from outside: the sum over ranks counts a shared page once."""

    def __init__(self, folder):
        self.folder = Path(folder)
        for old in self.folder.iterdir():
            old.unlink()
        self.peak = 0

    def __call__(self):
        total = 0
        for file in self.folder.iterdir():
            try:
                rank = json.loads(file.read_text())
                total += resident.pss(rank["pid"]) - rank["pss"]
            except (OSError, KeyError, ValueError):
                return  # starting or ending
        self.peak = max(self.peak, total)


def measure(args, contenders):
    options = ["--model", args.model, "--tokens", str(args.tokens), "--batch", str(args.batch), "--checked", "2"]
    watches = {}
    with tempfile.TemporaryDirectory() as folder:
        reference = running.make_reference(args, folder, options)
        pids = os.path.join(folder, "pids")
        os.mkdir(pids)

        def watch_for(contender):
            watches.setdefault(contender.name, []).append(PssWatch(pids))
            return watches[contender.name][-1]

        results = running.alternate(args, contenders, [*options, "--steps", "1", "--reference", reference, "--pid-file", pids], watch_for)
    results["peak_pss_sum_bytes"] = {name: max(w.peak for w in all_of_it) for name, all_of_it in watches.items()}
    argv = [args.python, str(running.HERE / "train_step.py"), "--activations", *options]
    results["model"] = running.execute(argv, running.environment(args, "loop"), args.timeout)
    return results


def rows(args, results):
    model = results["model"]
    peaks = {name: statistics.median(max(run["peak_over_imports_bytes"]) for run in runs) for name, runs in results["contenders"].items()}
    for name, peak in peaks.items():
        allowed, ratio, verdict = "", "", ""
        lib, _, stage = name.partition(":")
        if stage:
            bound = allowed_bytes(int(stage), model["numel"], model["unit_numel"], model["activations_bytes"], args.ranks)
            allowed, ratio = f"{bound / MIB:.0f}", f"{peak / bound:.2f}"
            if lib == "ours":
                peers = [peaks[p] for p in ("fsdp2", "deepspeed:" + stage) if p in peaks]
                met = peak <= SLACK * bound and all(peak < p for p in peers)
                verdict = ("met" if peers else "formula met, no peer measured") if met else "MISSED"
        pss = results["peak_pss_sum_bytes"][name] / args.ranks
        yield [name, f"{peak / MIB:.0f}", f"{pss / MIB:.0f}", allowed, ratio, f"≤ {SLACK}" if verdict else "", verdict]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    running.add_arguments(parser, CONTENDERS)
    parser.set_defaults(rounds=1)
    parser.add_argument("--model", choices=models.MODELS, default="gpt-300m")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--batch", type=int, default=1)
    args = parser.parse_args()
    results = measure(args, running.chosen(args))
    model = results["model"]
    print(f"\n### Peak memory a rank over the imports: {args.model} ({model['numel'] / 1e6:.1f} M), fp32, {args.tokens} tokens × {args.batch}, "
          f"{args.ranks} ranks\n\nUnit {4 * model['unit_numel'] / MIB:.0f} MiB, activations {model['activations_bytes'] / MIB:.0f} MiB "
          f"(autograd keeps {model['saved_bytes'] / MIB:.0f}). Huge pages: {resident.huge_pages_policy()}.\n")
    header = ["", "VmHWM, MiB", "PSS, mean of ranks, MiB", "formula, MiB", "VmHWM / formula", "bar", ""]
    print(running.table(header, rows(args, results)) + running.failures(results))
    running.save(args, {"machine": running.machine(), **results})


if __name__ == "__main__":
    main()
