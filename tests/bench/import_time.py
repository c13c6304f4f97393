# SPDX-License-Identifier: Apache-2.0
"""What `import deepspeed` costs over `import torch`, what it does on the side, how long `deepspeed --help` takes, and how much later
than under `python script` a script's first line runs under `deepspeed script` (one process, then two).

    python tests/bench/import_time.py --pythonpath . --peer-python PEER/bin/python
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

import running

BAR_MS = 50
HELP_BAR_MS = 150
REACHED_BAR_MS = 300
PROBE = """
import json, sys, time
begin = time.perf_counter()
import {first}
middle = time.perf_counter()
import deepspeed
end = time.perf_counter()
torch = sys.modules.get("torch")
context = bool(torch and torch.cuda.is_initialized())
print("RESULT " + json.dumps({{"first_s": middle - begin, "over_s": end - middle, "torch": torch is not None, "cuda_context": context}}))
"""


def probe(python, env, first):
    with tempfile.TemporaryDirectory() as folder:
        run = subprocess.run([python, "-c", PROBE.format(first=first)], env=dict(env, TORCH_EXTENSIONS_DIR=folder),
                             capture_output=True, text=True, cwd=folder, timeout=300)
        if run.returncode:
            raise running.Failed(run.stderr.strip().splitlines()[-1])
        noise = [line for line in (run.stdout + run.stderr).splitlines() if not line.startswith("RESULT ")]
        result = json.loads(run.stdout[run.stdout.index("RESULT ") + 7:].splitlines()[0])
        return {**result, "printed": noise, "compiled": sorted(os.listdir(folder))}


def wall(argv, env):
    begin = time.perf_counter()
    subprocess.run(argv, env=env, capture_output=True, check=True, cwd="/", timeout=300)
    return time.perf_counter() - begin


def reached(prefix, env, launcher_args=()):
    """Seconds from a command until the last of its processes runs the script's first line. Both clocks are the machine's monotonic one."""
    with tempfile.TemporaryDirectory() as folder:
        script = os.path.join(folder, "script.py")
        with open(script, "w") as file:
            file.write("import os, time\nopen(f'{__file__}.{os.getpid()}', 'w').write(str(time.monotonic()))\n")
        begin = time.monotonic()
        subprocess.run([*prefix, *launcher_args, script], env=env, capture_output=True, check=True, cwd="/", timeout=300)
        times = [float(open(os.path.join(folder, name)).read()) for name in os.listdir(folder) if name != "script.py"]
        return max(times) - begin


def one_library(args, lib, python):
    env = running.environment(args, lib)
    probes = [probe(python, env, "torch") for _ in range(args.rounds)]
    alone = [probe(python, env, "sys") for _ in range(args.rounds)]
    helps = [wall([python, "-m", "deepspeed.launcher.runner", "--help"], env) for _ in range(args.rounds)]
    bare = [wall([python, "-c", "pass"], env) for _ in range(args.rounds)]
    launch = [python, "-m", "deepspeed.launcher.runner", "-H", "", "--no_local_rank", "--num_gpus"]
    direct, one, two = ([reached(prefix, env) for _ in range(args.rounds)] for prefix in ([python], [*launch, "1"], [*launch, "2"]))
    return {
        "reached_one_ms": 1e3 * (statistics.median(one) - statistics.median(direct)),
        "reached_two_ms": 1e3 * (statistics.median(two) - statistics.median(direct)),
        "over_torch_ms": 1e3 * statistics.median(p["over_s"] for p in probes), "torch_ms": 1e3 * statistics.median(p["first_s"] for p in probes),
        "alone_ms": 1e3 * statistics.median(p["over_s"] for p in alone), "alone_imports_torch": alone[0]["torch"],
        "printed": probes[0]["printed"], "compiled": probes[0]["compiled"], "cuda_context": probes[0]["cuda_context"],
        "help_ms": 1e3 * statistics.median(helps), "bare_python_ms": 1e3 * statistics.median(bare), "load": os.getloadavg(),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    running.add_arguments(parser, "ours:0,deepspeed:0")
    parser.set_defaults(rounds=5)
    args = parser.parse_args()
    results, rows = {"machine": running.machine()}, []
    for lib in dict.fromkeys(c.lib for c in running.chosen(args)):
        try:
            with running.locked(args.lock):
                r = results[lib] = one_library(args, lib, args.peer_python if lib == "deepspeed" else args.python)
        except (running.Failed, subprocess.SubprocessError) as problem:
            print(f"{lib} failed: {problem}", file=sys.stderr)
            continue
        quiet = not r["printed"] and not r["compiled"] and not r["cuda_context"]
        good = r["over_torch_ms"] <= BAR_MS and quiet and r["help_ms"] <= HELP_BAR_MS and r["reached_one_ms"] <= REACHED_BAR_MS
        rows.append([lib, f"{r['over_torch_ms']:.0f}", f"{r['torch_ms']:.0f}", f"{r['alone_ms']:.0f}", "yes" if r["alone_imports_torch"] else "no",
                     len(r["printed"]), len(r["compiled"]), "yes" if r["cuda_context"] else "no", f"{r['help_ms']:.0f}",
                     f"{r['bare_python_ms']:.0f}", f"{r['reached_one_ms']:.0f}",
                     f"{r['reached_two_ms']:.0f}", ("met" if good else "MISSED") if lib == "ours" else ""])
    header = ["", "import over torch, ms", "torch, ms", "import alone, ms", "pulls torch in", "lines printed", "files compiled", "CUDA context",
              "--help, ms", "python -c pass, ms", "script reached later, ms", "the same, 2 processes",
              f"≤ {BAR_MS} ms and silent, help ≤ {HELP_BAR_MS} ms, reached ≤ {REACHED_BAR_MS} ms"]
    print("\n### Import\n\n" + running.table(header, rows))
    running.save(args, results)


if __name__ == "__main__":
    main()
