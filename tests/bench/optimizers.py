# SPDX-License-Identifier: Apache-2.0
"""Optimizer updates and list operations beside torch, DeepSpeed's CPU Adam (--peer PYTHON: an environment that has it) and a plain copy.

    python tests/bench/optimizers.py [--numel 64000000] [--threads 1] [--rounds 7] [--peer /path/to/python] [--only AdamW] [--device cuda]
    python tests/bench/optimizers.py --pairs 500000000 --peer ...     # ours and one peer at a time, for sizes of which memory holds only two

Bytes are those an update must move: each array once in, once out (a copy's: as many). The peer steps in a process of its own, in turn with ours.
"""
import gc
import statistics
import subprocess
import sys
import time

import op_race
import torch
from op_race import CEILING, OURS, Case

from deepspeed.ops import reference  # noqa: E402
from deepspeed.ops.adagrad import DeepSpeedCPUAdagrad  # noqa: E402
from deepspeed.ops.adam import FusedAdam  # noqa: E402
from deepspeed.ops.lion import FusedLion  # noqa: E402
from deepspeed.ops.multi_tensor import clip_grad_norm_  # noqa: E402
from deepspeed.ops.sgd import FusedSGD  # noqa: E402

BAR = 1.05  # the best of the peers over ours, for Adam
CHECKED = 10_007

_PEER = """
import sys, torch
n, threads = int(sys.argv[1]), int(sys.argv[2])
torch.set_num_threads(threads)
from deepspeed.ops.adam import DeepSpeedCPUAdam
p = torch.nn.Parameter(torch.randn(n)); p.grad = torch.randn(n)
optimizer = DeepSpeedCPUAdam([p], weight_decay=0.01)
optimizer.step()
print("READY", flush=True)
for line in sys.stdin:
    optimizer.step(); print("DONE", flush=True)
"""


class Peer:
    """DeepSpeedCPUAdam of another environment: calling it makes one step and waits for it."""

    def __init__(self, python, numel, threads):
        self.process = subprocess.Popen([python, "-c", _PEER, str(numel), str(threads)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=subprocess.DEVNULL, text=True, cwd="/")
        self._wait_for("READY")

    def _wait_for(self, word):
        for line in self.process.stdout:  # it also prints what it compiles
            if line.strip() == word:
                return
        raise SystemExit("the peer failed")

    def __call__(self):
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        self._wait_for("DONE")

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def parameter(numel, dtype=torch.float32, device="cpu"):
    p = torch.nn.Parameter(torch.randn(numel, device=device).to(dtype))
    p.grad = torch.randn(numel, device=device).to(dtype)
    return p


def checker(make, exact_update, device, dtype=torch.float32):
    """One step of make([p]) against the formula in float64: within four roundings of the parameter's dtype, or of float32 near zero."""
    def check():
        p = parameter(CHECKED, dtype, device)
        exact, grad = p.detach().double(), p.grad.double()
        make([p]).step()
        exact_update(exact, grad)
        torch.testing.assert_close(p.detach().double(), exact, rtol=4 * torch.finfo(dtype).eps, atol=1e-6)
    return check


def _exact(name, states, **options):
    def update(p, g):
        getattr(reference, name)([p], [g], *([torch.zeros_like(p)] for _ in range(states)), weight_decay=0.01, lr=1e-3, **options)
    return update


ADAM = _exact("adam_step", 2, step=1, beta1=0.9, beta2=0.999, eps=1e-8, adamw=True, bias_correction=True)
LION = _exact("lion_step", 1, beta1=0.9, beta2=0.999)
ADAGRAD = _exact("adagrad_step", 1, eps=1e-10)
SGD = _exact("sgd_step", 1, momentum=0.9, dampening=0.0, nesterov=False, first_step=True)


def adam(params, **options):
    return FusedAdam(params, lr=1e-3, weight_decay=0.01, **options)


def torch_adam(params):
    return torch.optim.AdamW(params, lr=1e-3, weight_decay=0.01, fused=True)


def storages(n, device):
    """AdamW in every form of master and state: (name, bytes an element, dtype, options)."""
    bf16 = torch.bfloat16
    for name, size, dtype, options in [
            ("bf16, fp32 states", 22, bf16, {}), ("split master", 26, bf16, dict(master="split")),
            ("bf16 stochastic", 22, bf16, dict(rounding="stochastic")), ("split, bf16 states", 18, bf16, dict(master="split", state_dtype=bf16)),
            ("split, 8-bit states", 14, bf16, dict(master="split", state_dtype="8bit")), ("fp32, 8-bit states", 16, torch.float32, dict(state_dtype="8bit"))]:
        make = lambda ps, options=options: adam(ps, **options)  # noqa: E731
        peer = torch_adam([parameter(n, dtype, device)]).step
        yield Case(f"AdamW {name}", {OURS: make([parameter(n, dtype, device)]).step, f"torch fused ({'14' if dtype == bf16 else '28'} B)": peer},
                   checker(make, ADAM, device, dtype), size * n)


def many_small(device, count=20_000, numel=64):
    """Small parameters: what counts is what each of them costs besides its elements."""
    def params():
        values, grads = torch.randn(count, numel, device=device), torch.randn(count, numel, device=device)
        ps = [torch.nn.Parameter(v) for v in values.unbind()]
        for p, g in zip(ps, grads.unbind()):
            p.grad = g
        return ps

    ours, theirs = params(), params()
    fused, other = adam(ours), torch_adam(theirs)
    yield Case(f"AdamW {count} x {numel}", {OURS: fused.step, "torch fused": other.step}, checker(adam, ADAM, device),
               bars={"torch fused": 3.0 if device == "cuda" else 1.0})
    yield Case(f"clip_grad_norm_ {count} x {numel}",
               {OURS: lambda: clip_grad_norm_(ours, 1e9), "torch": lambda: torch.nn.utils.clip_grad_norm_(theirs, 1e9)}, lambda: check_clip(device))


def check_clip(device):
    ours, theirs = parameter(CHECKED, device=device), parameter(CHECKED, device=device)
    theirs.grad.copy_(ours.grad)
    norm, other = clip_grad_norm_([ours], 1.0), torch.nn.utils.clip_grad_norm_([theirs], 1.0)
    torch.testing.assert_close(norm.float(), other)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=0)


def cases(args):
    n, device = args.numel, args.device
    contenders = {OURS: adam([parameter(n, device=device)]).step, "torch fused": torch_adam([parameter(n, device=device)]).step}
    peer = Peer(args.peer, n, args.threads) if args.peer and device == "cpu" else None
    if peer:
        contenders["DeepSpeedCPUAdam"] = peer
    yield Case("AdamW fp32", contenders, checker(adam, ADAM, device), 28 * n,
               {name: BAR for name in contenders if name != OURS} if device == "cpu" else op_race.SHARE_BAR)
    if peer:
        peer.close()
    del contenders
    yield from storages(n, device)
    lion = lambda ps: FusedLion(ps, lr=1e-3, betas=(0.9, 0.999), weight_decay=0.01)  # noqa: E731
    yield Case("Lion fp32", {OURS: lion([parameter(n, device=device)]).step}, checker(lion, LION, device), 20 * n)
    adagrad = lambda ps: DeepSpeedCPUAdagrad(ps, lr=1e-3, weight_decay=0.01)  # noqa: E731
    contenders = {OURS: adagrad([parameter(n, device=device)]).step}
    if device == "cpu":
        contenders["torch fused"] = torch.optim.Adagrad([parameter(n)], lr=1e-3, weight_decay=0.01, fused=True).step
    yield Case("Adagrad fp32", contenders, checker(adagrad, ADAGRAD, device), 20 * n)
    sgd = lambda ps: FusedSGD(ps, lr=1e-3, momentum=0.9, weight_decay=0.01)  # noqa: E731
    theirs = torch.optim.SGD([parameter(n, device=device)], lr=1e-3, momentum=0.9, weight_decay=0.01, fused=True)
    yield Case("SGD fp32", {OURS: sgd([parameter(n, device=device)]).step, "torch fused": theirs.step}, checker(sgd, SGD, device), 20 * n)
    ours, theirs = parameter(n, device=device), parameter(n, device=device)
    yield Case("clip_grad_norm_ fp32", {OURS: lambda: clip_grad_norm_([ours], 1e9),
                                        "torch": lambda: torch.nn.utils.clip_grad_norm_([theirs], 1e9)}, lambda: check_clip(device), 4 * n)
    yield from many_small(device)


def times_in_turns(bodies, rounds):
    """Seconds of each in every round, the order turned round from one to the next, after two that do not count."""
    spent = {name: [] for name in bodies}
    for turn in range(-2, rounds):
        for name, body in list(bodies.items())[::-1 if turn % 2 else 1]:
            begin = time.perf_counter()
            body()
            if turn >= 0:
                spent[name].append(time.perf_counter() - begin)
    return spent


def in_pairs(numel, threads, rounds, python):
    """AdamW fp32, ours and one peer at a time in turns, beside a copy of 256 MiB and an addition in place of as much, which like an update reads
    what it writes. What memory gives changes from second to second where others share it: the ratio is the median of the rounds' ratios, with its
    quartiles."""
    torch.set_num_threads(threads)
    checker(adam, ADAM, "cpu")()
    source, target = torch.ones(2**26), torch.empty(2**26)
    peers = {"torch fused": lambda: torch_adam([parameter(numel)]).step}
    if python:
        peers["DeepSpeedCPUAdam"] = lambda: Peer(python, numel, threads)
    print(f"AdamW fp32, {numel:,} elements, {threads} thread(s), in pairs, medians of {rounds} rounds")
    ours = adam([parameter(numel)]).step
    for name, make in peers.items():
        body = make()
        spent = times_in_turns({OURS: ours, name: body, CEILING: lambda: target.copy_(source), "addition": lambda: target.add_(source)}, rounds)
        seconds = {who: statistics.median(times) for who, times in spent.items()}
        low, ratio, high = statistics.quantiles((theirs / mine for theirs, mine in zip(spent[name], spent[OURS])), n=4)
        copy_rate, addition_rate = 2 * source.nbytes / seconds[CEILING] / 1e9, 3 * source.nbytes / seconds["addition"] / 1e9
        for who in (OURS, name):
            rate = 28 * numel / seconds[who] / 1e9
            bar = f" | {name} {ratio:5.2f}x ({low:.2f} to {high:.2f}; bar {BAR}{' MISSED' if ratio < BAR else ''})" if who == OURS else ""
            print(f"{who:18s} {seconds[who] * 1e3:9.1f} ms {rate:6.1f} GB/s, {rate / copy_rate:4.0%} of {CEILING}, {rate / addition_rate:4.0%} of addition{bar}", flush=True)
        if isinstance(body, Peer):
            body.close()
        del body
        gc.collect()


if __name__ == "__main__":
    if "--pairs" in sys.argv:
        option = lambda name, default: sys.argv[sys.argv.index(name) + 1] if name in sys.argv else default  # noqa: E731
        in_pairs(int(option("--pairs", 0)), int(option("--threads", 1)), int(option("--rounds", 30)), option("--peer", ""))
    else:
        op_race.main(__doc__, cases, numel=64_000_000, peer="", pairs=0)
