# SPDX-License-Identifier: Apache-2.0
"""Races of one operator against its peers, beside the machine's ceiling: what every tests/bench/<operator>.py is made of.

A case says what it computes, who can compute it and how many bytes any of them must move. It is checked before it is timed, and a wrong
contender ends the run. Contenders take turns in every round, ours and theirs and a plain copy of the same number of bytes, so that a
busy machine hurts all alike; medians count. A figure is printed with its rate, its share of the copy's rate and the peers' times over ours.
On a GPU the copy is a large one, 1 GiB, whatever the case moves. --compiled adds torch.compile of torch's way.
The allocator keeps what is freed, for all contenders alike: else the kernel's zeroing of fresh pages is most of what one sees.
"""
import argparse
import ctypes
import json
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402

OURS, CEILING, COMPILED, SHARED = "ours", "copy", "compiled", "shared"
GPU_COPY_BYTES = 2**30
HEAD_START_CYCLES = (4_000_000, 16_000_000, 64_000_000)  # of a GPU: some two milliseconds, and more where the host needs longer
SHARE_BAR = {CEILING: 0.9}  # of what is limited by a GPU's memory alone
COMPILED_SHARE = 0.65  # from this share of the copy's rate on, torch.compile leaves too little to gain: its bar does not count


@dataclass
class Case:
    """One race. `contenders` maps names to functions without arguments, "ours" among them. `check()` raises if ours is wrong.
    `moved_bytes` counts each array once in and once out; 0 leaves the copy out. `bars` maps a peer to the least "peer's time over ours", and
    "copy" to the least share of the copy's rate. `shared()`: what every contender does besides, timed in the same rounds and subtracted."""
    name: str
    contenders: dict
    check: object
    moved_bytes: int = 0
    bars: dict = field(default_factory=dict)
    shared: object = None


def later(make):
    """A contender that is made when it is first called: cases that --only leaves out cost nothing."""
    made = []

    def body():
        if not made:
            made.append(make())
        return made[0]()
    return body


def in_a_graph(function, leaves):
    """A contender: the backward pass of function(*leaves), a tensor or some, as it runs in a model: the gradients of its results come from what is
    behind it, here multiplications, and nobody else holds them. What those take is `in_a_graph(identity, results)`, to be a case's `shared`."""
    def make():
        inputs = [t.detach().requires_grad_() for t in leaves]
        results = function(*inputs)
        ends = [y * 2 for y in (results if isinstance(results, tuple) else (results,))]
        grads = [torch.ones((), device=y.device, dtype=y.dtype).expand(y.shape) for y in ends]
        return lambda: torch.autograd.grad(ends, inputs, grads, retain_graph=True)
    return later(make)


def identity(*tensors):
    return tensors


def with_compiled(args, ways):
    """{"ours": f, "torch": g} and, with --compiled, torch.compile of g."""
    if not args.compiled:
        return ways
    torch.compiler.reset()  # of the cases before: their shapes are not to make this one's dynamic
    return {**ways, COMPILED: torch.compile(ways["torch"], dynamic=False)}


def assert_no_worse(ours, peer, exact, what, times=2.0):
    """Ours errs from the fp64 value `exact` at most `times` as much as the peer at the same dtype, each by its largest error. An error below
    one rounding of the largest value is always good enough: peers are sometimes exact by chance."""
    scale = exact.abs().max().item() if exact.numel() else 0.0
    floor = torch.finfo(ours.dtype).eps / 2 * scale
    error, allowed = (ours.double() - exact).abs().max().item(), times * (peer.double() - exact).abs().max().item()
    if not error <= max(allowed, floor):
        raise AssertionError(f"{what}: error {error:.3g} against fp64, the peer's is {allowed / times:.3g}")


def keep_freed_memory():
    """glibc's malloc takes every array, however large, from its heap and gives nothing back to the kernel. (A threshold for mmap would not do: it
    refuses more than 32 MiB.) Pages are reused from about the eighth array of a size on, when the caches of small chunks, which hold what aligning
    an array cuts off, are full: hence the long first round. Other C libraries stay as they are."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    for name, number, value in (("M_MMAP_MAX", -4, 0), ("M_TRIM_THRESHOLD", -1, -1)):  # malloc.h
        if mallopt(number, value) != 1:
            raise OSError(f"mallopt refuses {name} = {value}")


def _seconds(body, device, budget_s=0.02, ahead=False):
    """Seconds one call takes, over as many calls as fill the budget; on a GPU timed by events. ahead: the GPU sleeps until all calls are enqueued,
    so that its own time is what one sees and not how fast the host asks; longer, if the host was late. (A body that waits for the GPU always is.)"""
    if device.type == "cuda":
        for cycles in HEAD_START_CYCLES if ahead else (0,):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            if cycles:
                torch.cuda._sleep(cycles)
            begin.record()
            for _ in range(10):
                body()
            in_time = not begin.query()
            end.record()
            end.synchronize()
            if in_time:
                break
        return begin.elapsed_time(end) / 1e4
    calls, begin = 0, time.perf_counter()
    while True:
        body()
        calls += 1
        spent = time.perf_counter() - begin
        if spent > budget_s:
            return spent / calls


def run(case, device, rounds):
    """{"case": name, "<contender>_s": median seconds, ...} after the check has passed."""
    case.check()
    contenders = dict(case.contenders)
    if case.moved_bytes:
        copied = GPU_COPY_BYTES if device.type == "cuda" else case.moved_bytes // 2
        source = torch.ones(max(1, copied // 4), dtype=torch.float32, device=device)
        target = torch.empty_like(source)
        contenders[CEILING] = lambda: target.copy_(source)
    if case.shared is not None:
        contenders[SHARED] = case.shared
    times = {name: [] for name in contenders}
    for turn in range(rounds + 1):
        for name, body in contenders.items():
            spent = _seconds(body, device, 0.02 if turn else 0.25, ahead=case.moved_bytes > 0)
            if turn:  # the first round warms up
                times[name].append(spent)
    medians = {name: statistics.median(spent) for name, spent in times.items()}
    for name in case.contenders if case.shared is not None else ():
        medians[name] -= medians[SHARED]
        if medians[name] <= 0:
            raise RuntimeError(f"{case.name}: {name} took no longer than what all contenders share: something else ran on this machine")
    return {"case": case.name, "moved_bytes": case.moved_bytes, "copied_bytes": 2 * source.nbytes if case.moved_bytes else 0, "bars": case.bars,
            **{f"{name}_s": spent for name, spent in medians.items()}}


def share(result, name):
    """A contender's rate over the copy's."""
    return result["moved_bytes"] / result[f"{name}_s"] / (result["copied_bytes"] / result[f"{CEILING}_s"])


def line(result):
    """One printed line of a result, and whether every bar is met."""
    ours, bars, missed = result[f"{OURS}_s"], result["bars"], []

    def against(name, value, bar):
        if bar is not None and value < bar:
            missed.append(name)
        return f" (bar {bar:g}{' MISSED' if name in missed else ''})" if bar is not None else ""

    text = f"{result['case']:44s} ours {ours * 1e3:9.3f} ms"
    if result["moved_bytes"]:
        part = share(result, OURS)
        text += f" {result['moved_bytes'] / ours / 1e9:7.1f} GB/s {part:5.0%} of copy{against(CEILING, part, bars.get(CEILING))}"
    for key, seconds in result.items():
        name = key.removesuffix("_s")
        if not key.endswith("_s") or name in (OURS, CEILING, SHARED):
            continue
        bar = bars.get(name)
        if name == COMPILED and result["moved_bytes"]:
            text += f" | {name} at {share(result, name):.0%} of copy"
            bar = bar if share(result, name) < COMPILED_SHARE else None
        else:
            text += f" | {name}"
        text += f" {seconds / ours:5.2f}x{against(name, seconds / ours, bar)}"
    return text, not missed


def main(description, cases, **extra_arguments):
    """Parses --threads, --rounds, --device, --only, --out (and `extra_arguments`: name=default), then runs cases(args) in order."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", default="", help="run the cases whose name contains this")
    parser.add_argument("--compiled", action="store_true", help="race against torch.compile of torch's way, too, where there is one")
    parser.add_argument("--out", help="write the results to this JSON file")
    for name, default in extra_arguments.items():
        parser.add_argument("--" + name.replace("_", "-"), type=type(default), default=default)
    args = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device, results, missed = torch.device(args.device), [], 0
    hardware = torch.cuda.get_device_name() if device.type == "cuda" else f"{args.threads} thread(s)"
    print(f"{hardware}, torch {torch.__version__}; medians of {args.rounds} rounds")
    for case in cases(args):
        if args.only in case.name:
            results.append(run(case, device, args.rounds))
            text, good = line(results[-1])
            missed += not good
            print(text, flush=True)
    if not results:
        parser.error(f"--only {args.only!r}: no case's name contains it")
    if any(result["bars"] for result in results):
        print(f"{missed} of {len(results)} cases miss a bar")
    if args.out:
        Path(args.out).write_text(json.dumps({"hardware": hardware, "torch": torch.__version__, "results": results}, indent=1) + "\n")
