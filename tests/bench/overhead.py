# SPDX-License-Identifier: Apache-2.0
"""The library's own time: 1024 modules of one 64-element parameter each, microseconds a parameter over a bare torch loop.

    python tests/bench/overhead.py --peer-python PEER/bin/python --out overhead.json

The bare loop (forward, backward, fused AdamW, no communication) runs on as many ranks at once; what a library needs above it,
communication included, is divided by the number of parameters.
"""
import argparse
import statistics
import tempfile

import models
import running

CONTENDERS = "loop,ours:0,ours:1,ours:2,ours:3,ddp,deepspeed:0,deepspeed:1,deepspeed:2,deepspeed:3"
BARS_US = {"ours:0": 10, "ours:1": 10, "ours:2": 10, "ours:3": 30}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    running.add_arguments(parser, CONTENDERS)
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    contenders = running.chosen(args)
    if contenders[0].lib != "loop":
        parser.error("--contenders must begin with loop: everything is counted over it")
    options = ["--model", "tiny1024", "--batch", "1", "--tokens", "1"]
    with tempfile.TemporaryDirectory() as folder:
        reference = running.make_reference(args, folder, options)
        results = running.alternate(args, contenders, [*options, "--steps", str(args.steps), "--reference", reference])
    count = models.Chain.modules_count
    rows = []
    for name, runs in results["contenders"].items():
        # in the same round, so that a machine that slows down does so for both
        over = [(run["median_s"] - bare["median_s"]) / count * 1e6 for run, bare in zip(runs, results["contenders"]["loop"])]
        results.setdefault("us_per_parameter", {})[name] = statistics.median(over)
        bar = BARS_US.get(name)
        shown = f"{statistics.median(over):.1f}" if name != "loop" else "0"
        rows.append([name, f"{1e3 * running.median_of(results, name):.2f}", shown, f"≤ {bar}" if bar else "",
                     running.verdict(statistics.median(over), bar) if bar else "", f"{max(run['load'][0] for run in runs):.1f}"])
    print(f"\n### {count} modules of one {models.Chain.width}-element parameter, {args.ranks} ranks\n")
    print(running.table(["", "step, ms", "µs a parameter over the bare loop", "bar", "", "load"], rows) + running.failures(results))
    running.save(args, {"machine": running.machine(), **results})


if __name__ == "__main__":
    main()
