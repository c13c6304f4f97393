# SPDX-License-Identifier: Apache-2.0
"""Step time of one GPT under every library, in alternation, beside the machine's ceilings and the bars it must reach.

    python tests/bench/compare.py --peer-python PEER/bin/python --out times.json                # the 25 M GPT, both sizes
    python tests/bench/compare.py --case 128x2 --contenders ours:3,ddp,fsdp2 --dtype bf16
"""
import argparse
import tempfile

import models
import running

CONTENDERS = "ours:0,ddp,ours:1,deepspeed:0,ours:2,fsdp2,ours:3,deepspeed:1,deepspeed:2,deepspeed:3"
# case -> (who, over whom, bar). fp32 on two ranks; other settings are shown without a verdict.
BARS = {
    "128x2": [("ours:1", "ddp", 1.05), ("ours:2", "ddp", 1.05), ("ours:3", "ddp", 1.25), ("ours:3", "fsdp2", 0.8)],
    "16x1": [("ours:3", "deepspeed:3", 0.5), ("ours:3", "fsdp2", 0.7)],
}
FP32_BYTES = 4


def floor_s(model, numel, tokens, batch, accumulation, ranks, results):
    """Time below which no library gets in fp32 without overlap of cores: the multiply-adds at the sgemm ceiling, then, at the copy
    ceiling, weights read in forward and backward, gradients written and read once, and AdamW's seven streams over 1/N."""
    flops = accumulation * model.flops(numel, batch, tokens)
    moved = FP32_BYTES * numel * (2 * accumulation + 2 * accumulation + 7 / ranks)
    return flops / (1e9 * running.ceiling(results, "sgemm_gflops")) + moved / (1e9 * running.ceiling(results, "copy_gbs"))


def rows(args, results, model, numel, tokens, batch):
    floor = floor_s(model, numel, tokens, batch, args.accumulation, args.ranks, results)
    flops = args.accumulation * model.flops(numel, batch, tokens)
    for name, runs in results["contenders"].items():
        median = running.median_of(results, name)
        medians = [run["median_s"] for run in runs]
        over = []
        for peer in ("ddp", "fsdp2"):
            base = running.median_of(results, peer)
            over.append(f"{median / base:.2f}" if base else "-")
        share = flops / median / 1e9 / running.ceiling(results, "sgemm_gflops")
        peak = max(base + over for run in runs for base, over in zip(run["base_rss_bytes"], run["peak_over_imports_bytes"]))
        cpu = running.median_of(results, name, "cpu_s")
        yield [name, f"{1e3 * median:.1f}", f"{1e3 * min(medians):.1f} to {1e3 * max(medians):.1f}", *over, f"{1e3 * cpu:.1f}",
               f"{flops / median / 1e9:.1f} ({share:.0%})", f"{median / floor:.2f}", f"{peak / 2**20:.0f}", f"{max(run['load'][0] for run in runs):.1f}"]


def bars(args, case, results):
    if args.dtype != "fp32" or args.model != "gpt-25m" or args.ranks != 2 or args.accumulation != 1:
        return ""
    lines = []
    for who, whom, bar in BARS.get(case, []):
        ours, theirs = running.median_of(results, who), running.median_of(results, whom)
        ratio = ours / theirs if ours and theirs else None
        lines.append([f"{who} / {whom}", f"≤ {bar}", "-" if ratio is None else f"{ratio:.2f}", running.verdict(ratio, bar)])
    return "\n\n" + running.table(["ratio of medians", "bar", "measured", ""], lines) if lines else ""


def one_case(args, case):
    tokens, batch = (int(part) for part in case.split("x"))
    model = models.MODELS[args.model]
    options = ["--model", args.model, "--dtype", args.dtype, "--accumulation", str(args.accumulation),
               "--tokens", str(tokens), "--batch", str(batch)]
    timed = [*options, "--nvme", args.nvme] if args.nvme else options
    with tempfile.TemporaryDirectory() as folder:
        reference = running.make_reference(args, folder, options)
        results = running.alternate(args, running.chosen(args), [*timed, "--steps", str(args.steps), "--reference", reference])
    numel = sum(p.numel() for p in models.build(args.model).parameters())
    copy, sgemm = running.ceiling(results, "copy_gbs"), running.ceiling(results, "sgemm_gflops")
    header = ["", "step, ms", "rounds, ms", "× DDP", "× FSDP2", "CPU a rank, ms", "GFLOP/s a rank (of ceiling)", "× floor", "peak resident, MiB", "load"]
    print(f"\n### {args.model} ({numel / 1e6:.1f} M), {tokens} tokens × {batch}, {args.dtype}, accumulation {args.accumulation}, "
          f"{args.ranks} ranks\n\nCeilings, all ranks at once, one thread each: copy {copy:.1f} GB/s, sgemm {sgemm:.0f} GFLOP/s.\n")
    print(running.table(header, rows(args, results, model, numel, tokens, batch)) + bars(args, case, results) + running.failures(results))
    return {"model": args.model, "numel": numel, "dtype": args.dtype, "accumulation": args.accumulation, "tokens": tokens, "batch": batch, **results}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    running.add_arguments(parser, CONTENDERS)
    parser.add_argument("--model", choices=models.MODELS, default="gpt-25m")
    parser.add_argument("--case", action="append", help="TOKENSxBATCH; default 128x2 and 16x1")
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--nvme", help="a folder: the state of ours and of DeepSpeed rests in files there")
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--steps", type=int, default=10)
    args = parser.parse_args()
    results = {"machine": running.machine(), "cases": {}}
    for case in args.case or ["128x2", "16x1"]:
        results["cases"][case] = one_case(args, case)
        running.save(args, results)


if __name__ == "__main__":
    main()
