# SPDX-License-Identifier: Apache-2.0
"""Starts the contenders of a comparison, each in fresh processes of its own interpreter, in alternation, and writes tables."""
import argparse
import contextlib
import fcntl
import json
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent


class Contender(NamedTuple):
    lib: str
    stage: int
    staged: bool  # whether `stage` means anything for this library

    @property
    def name(self):
        return f"{self.lib}:{self.stage}" if self.staged else self.lib

    @staticmethod
    def parse(text):
        lib, _, stage = text.partition(":")
        staged = lib in ("ours", "deepspeed")
        if staged != bool(stage):
            raise argparse.ArgumentTypeError(f"{text}: write ours:STAGE, deepspeed:STAGE, ddp, fsdp2 or loop")
        return Contender(lib, int(stage or 0), staged)


def add_arguments(parser, contenders):
    parser.add_argument("--contenders", default=contenders, help=f"default {contenders}; those of --peer-python are left out without it")
    parser.add_argument("--python", default=sys.executable, help="interpreter of ours, DDP, FSDP2 and the bare loop")
    parser.add_argument("--pythonpath", default="", help="PYTHONPATH for ours, when it is not installed in --python")
    parser.add_argument("--peer-python", help="interpreter that has the peer, DeepSpeed 0.19.8")
    parser.add_argument("--ours-launch", choices=["torchrun", "deepspeed"], default="torchrun", help="what starts the ranks of ours")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--timeout", type=float, default=900, help="seconds for one run of one contender")
    parser.add_argument("--lock", help="file locked during each run, so that benchmarks that share a machine take turns")
    parser.add_argument("--out", help="file for the results as JSON")


def chosen(args):
    all_of_them = [Contender.parse(text) for text in args.contenders.split(",")]
    return [c for c in all_of_them if c.lib != "deepspeed" or args.peer_python]


class Failed(Exception):
    """A contender that crashed, hung or was refused; the text says which and why."""


def environment(args, lib):
    env = dict(os.environ, OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
    env.pop("PYTHONPATH", None)
    if lib == "ours" and args.pythonpath:
        env["PYTHONPATH"] = args.pythonpath
    if lib == "deepspeed":
        env["DS_ACCELERATOR"] = "cpu"
        # the peer compiles its operators at first use with the ninja beside its interpreter
        env["PATH"] = f"{Path(args.peer_python).parent}{os.pathsep}{env['PATH']}"
    return env


def command(args, lib, script, options):
    python = args.peer_python if lib == "deepspeed" else args.python
    script = str(HERE / script)
    if lib == "ours" and args.ours_launch == "deepspeed":
        return [python, "-m", "deepspeed.launcher.runner", "--num_gpus", str(args.ranks), script, *options]
    return [python, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(args.ranks), script, *options]


@contextlib.contextmanager
def locked(path):
    if not path:
        yield
        return
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def end(process):
    """Launchers start ranks in sessions of their own and end them when they are terminated, but not when they are killed."""
    with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(40)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def execute(argv, env, timeout, watch=None):
    """Runs a command to its end and returns the JSON of its RESULT line. watch() is called about five times a second meanwhile."""
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(argv, env=env, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        deadline = time.monotonic() + timeout
        try:
            while process.poll() is None and time.monotonic() < deadline:
                if watch:
                    watch()
                time.sleep(0.2)
        finally:
            late = process.poll() is None
            end(process)
        output.seek(0)
        text = output.read()
    for line in text.splitlines():
        if "RESULT {" in line:
            return json.loads(line[line.index("{"):])
    reason = f"not done after {timeout:g} s" if late else f"exit status {process.returncode}"
    said = re.search(r"not timed: .*|\b\w+Error: .*", text)
    raise Failed(f"{said[0] if said else reason}\n{reason}: {shlex.join(argv)}\n{text[-3000:]}")


def run(args, contender, script, options, watch=None):
    extra = ["--lib", contender.lib, "--stage", str(contender.stage)] if script == "train_step.py" else []
    with locked(args.lock):
        return execute(command(args, contender.lib, script, extra + options), environment(args, contender.lib), args.timeout, watch)


def make_reference(args, folder, options):
    """The losses that all contenders must have, computed once for all of them by one process of plain torch."""
    path = os.path.join(folder, "reference.json")
    argv = [args.python, str(HERE / "train_step.py"), "--write-reference", path, "--world-size", str(args.ranks), *options]
    with locked(args.lock):
        subprocess.run(argv, env=environment(args, "loop"), check=True, timeout=args.timeout)
    return path


def measure_ceilings(args):
    return run(args, Contender("loop", 0, False), "ceilings.py", [])


def alternate(args, contenders, options, watch_for=None):
    """rounds x (ceilings, then every contender once). A contender that fails once is not tried again.

    Returns {"contenders": {name: [result of each round]}, "failed": {name: why}, "ceilings": [one a round]}."""
    results = {c.name: [] for c in contenders}
    failed, ceilings = {}, []
    with contextlib.suppress(KeyboardInterrupt):  # Ctrl-C ends the measuring, not the report
        for number in range(args.rounds):
            ceilings.append(measure_ceilings(args))
            for contender in contenders:
                if contender.name not in failed:
                    _one_turn(args, number, contender, options, watch_for, results, failed)
    return {"contenders": {name: runs for name, runs in results.items() if runs}, "failed": failed, "ceilings": ceilings}


def _one_turn(args, number, contender, options, watch_for, results, failed):
    try:
        watch = watch_for(contender) if watch_for else None
        result = run(args, contender, "train_step.py", options, watch)
    except Failed as problem:
        failed[contender.name] = str(problem)
        print(f"{contender.name} failed: {problem}", file=sys.stderr, flush=True)
        return
    results[contender.name].append(result)
    print(f"round {number + 1}/{args.rounds} {contender.name}: {1e3 * result['median_s']:.1f} ms, load {result['load'][0]:.1f}",
          file=sys.stderr, flush=True)


def median_of(results, name, field="median_s"):
    runs = results["contenders"].get(name)
    return statistics.median(run[field] for run in runs) if runs else None


def ceiling(results, field):
    return max(c[field] for c in results["ceilings"])


def table(header, rows):
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows])


def failures(results):
    return "".join(f"\n{name}: {why.splitlines()[0]}" for name, why in results["failed"].items())


def verdict(measured, bar):
    return "not measured" if measured is None else ("met" if measured <= bar else "MISSED")


def machine():
    with open("/proc/cpuinfo") as file:
        models = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    return {"cpu": models[0] if models else "unknown", "cores": os.cpu_count(), "time": time.strftime("%Y-%m-%d %H:%M:%S")}


def save(args, results):
    if args.out:
        Path(args.out).write_text(json.dumps(results, indent=1))
