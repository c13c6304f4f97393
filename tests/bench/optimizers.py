# SPDX-License-Identifier: Apache-2.0
"""Optimizer updates and gradient sums beside torch, DeepSpeed's CPU Adam (if it is installed elsewhere: --peer) and the memory's ceiling, in one run.

    python tests/bench/optimizers.py [--numel 12500000] [--threads 1] [--rounds 8] [--peer /path/to/python/with/deepspeed]

Every case is checked against the plain reference before it is timed; a wrong one ends the run. Contestants take turns in every round, so
that a busy machine hurts all alike; the best round counts. Bytes are those an update must move: each array once in, once out.
The ceiling for an update is the same arrays read and written by torch's cheapest in-place operation that touches as many streams: p += c g.
"""
import argparse
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402

from deepspeed._native import lib  # noqa: E402
from deepspeed.ops import reference  # noqa: E402
from deepspeed.ops.adagrad import DeepSpeedCPUAdagrad  # noqa: E402
from deepspeed.ops.adam import FusedAdam  # noqa: E402
from deepspeed.ops.lion import FusedLion  # noqa: E402

_PEER = """
import sys, time, torch
n, threads, rounds = (int(x) for x in sys.argv[1:])
torch.set_num_threads(threads)
from deepspeed.ops.adam import DeepSpeedCPUAdam
p = torch.nn.Parameter(torch.randn(n)); p.grad = torch.randn(n)
optimizer = DeepSpeedCPUAdam([p], weight_decay=0.01)
best = 1e9
for _ in range(rounds + 2):
    start = time.perf_counter(); optimizer.step(); best = min(best, time.perf_counter() - start)
print(best)
"""


def parameter(numel, dtype=torch.float32):
    p = torch.nn.Parameter(torch.randn(numel).to(dtype))
    p.grad = torch.randn(numel).to(dtype)
    return p


def check_adam(dtype):
    """One FusedAdam step against the reference formula in float64."""
    p = parameter(10_007, dtype)
    exact = [p.detach().double(), p.grad.double(), torch.zeros(10_007).double(), torch.zeros(10_007).double()]
    FusedAdam([p], weight_decay=0.01).step()
    reference.adam_step(*([x] for x in exact), step=1, lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01, adamw=True,
                        bias_correction=True)
    torch.testing.assert_close(p.detach().double(), exact[0], rtol=2 * torch.finfo(dtype).eps, atol=1e-8)


def check_others():
    for kind, update in ((FusedLion, "lion_step"), (DeepSpeedCPUAdagrad, "adagrad_step")):
        p = parameter(10_007)
        exact = [p.detach().double(), p.grad.double(), torch.zeros(10_007).double()]
        kind([p], lr=1e-3).step()
        options = dict(beta1=0.9, beta2=0.999) if kind is FusedLion else dict(eps=1e-10)
        getattr(reference, update)(*([x] for x in exact), lr=1e-3, weight_decay=0.0, **options)
        torch.testing.assert_close(p.detach().double(), exact[0], rtol=1e-6, atol=1e-8)


def race(contestants, rounds):
    """{name: best seconds}; contestants take turns."""
    best = {name: float("inf") for name in contestants}
    for turn in range(rounds + 2):
        for name, body in contestants.items():
            start = time.perf_counter()
            body()
            if turn >= 2:
                best[name] = min(best[name], time.perf_counter() - start)
    return best


def peer_seconds(python, numel, threads, rounds):
    """DeepSpeedCPUAdam of another environment, in its own process."""
    result = subprocess.run([python, "-c", _PEER, str(numel), str(threads), str(rounds)], capture_output=True, text=True, cwd="/")
    if result.returncode != 0:
        sys.exit(f"the peer failed:\n{result.stderr[-2000:]}")
    return float(result.stdout.split()[-1])


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--numel", type=int, default=12_500_000)
    arguments.add_argument("--threads", type=int, default=1)
    arguments.add_argument("--rounds", type=int, default=8)
    arguments.add_argument("--peer", help="python of an environment with DeepSpeed")
    args = arguments.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        check_adam(dtype)
    check_others()

    n, bf16 = args.numel, torch.bfloat16
    adamw = torch.optim.AdamW([parameter(n)], weight_decay=0.01, fused=True)
    narrow_adamw = torch.optim.AdamW([parameter(n, bf16)], weight_decay=0.01, fused=True)
    adam, narrow = FusedAdam([parameter(n)], weight_decay=0.01), FusedAdam([parameter(n, bf16)], weight_decay=0.01)
    lion = FusedLion([parameter(n)])
    adagrad, torch_adagrad = DeepSpeedCPUAdagrad([parameter(n)]), torch.optim.Adagrad([parameter(n)], fused=True)
    a, b = torch.randn(n), torch.randn(n)
    low, copies = torch.empty(n, dtype=bf16), (torch.randn(n), torch.empty(n))
    cases = {
        # name: (body, bytes an element)
        "ceiling: copy": (lambda: copies[1].copy_(copies[0]), 8),
        "ceiling: p += c g": (lambda: a.add_(b, alpha=1e-9), 12),
        "AdamW fp32, torch fused": (adamw.step, 28),
        "AdamW fp32, ours": (adam.step, 28),
        "AdamW bf16, torch fused (bf16 states)": (narrow_adamw.step, 14),
        "AdamW bf16, ours (fp32 states)": (narrow.step, 22),
        "Lion fp32, ours": (lion.step, 20),
        "Adagrad fp32, torch fused": (torch_adagrad.step, 20),
        "Adagrad fp32, ours": (adagrad.step, 20),
        "cast fp32 -> bf16, torch": (lambda: low.copy_(a), 6),
        "cast fp32 -> bf16, ours": (lambda: lib().copy_scale(low, a, 1.0), 6),
    }
    best = race({name: body for name, (body, _) in cases.items()}, args.rounds)
    if args.peer:
        cases["AdamW fp32, DeepSpeedCPUAdam"] = (None, 28)
        best["AdamW fp32, DeepSpeedCPUAdam"] = peer_seconds(args.peer, n, args.threads, args.rounds)
    ceiling = max(cases[c][1] * n / best[c] for c in cases if c.startswith("ceiling"))
    print(f"{n:,} elements, {args.threads} thread(s); ceiling {ceiling / 1e9:.1f} GB/s")
    for name, (_, size) in cases.items():
        rate = size * n / best[name]
        print(f"{name:40s} {best[name] * 1e3:8.2f} ms {rate / 1e9:7.1f} GB/s {rate / ceiling:6.0%} of the ceiling")


if __name__ == "__main__":
    main()
