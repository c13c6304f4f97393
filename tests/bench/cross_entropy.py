# SPDX-License-Identifier: Apache-2.0
"""Cross-entropy of given logits, and fused with the linear layer: time beside torch, and how much memory each adds at its peak.

    python tests/bench/cross_entropy.py --threads 2 [--device cuda] [--tokens 8192 --vocabulary 32768 --features 512]

Bars of the fused one, forward and backward: time at most 1.1 times torch's, peak memory at least 8 times lower. Memory is measured in a process
for each contender: the peak of the resident size (on a GPU: of what torch's allocator handed out) less what was resident with the inputs made.
"""
import json
import subprocess
import sys

import torch
from torch.nn import functional as F

import op_race
from deepspeed.ops.cross_entropy import cross_entropy, linear_cross_entropy


def inputs(tokens, vocabulary, features, device):
    hidden = torch.randn(tokens, features, device=device).requires_grad_()
    weight = (torch.randn(vocabulary, features, device=device) * features**-0.5).requires_grad_()
    return hidden, weight, torch.randint(vocabulary, (tokens,), device=device)


def ours(hidden, weight, labels, chunk_tokens=None):
    return linear_cross_entropy(hidden, weight, labels, chunk_tokens=chunk_tokens)


def plain(hidden, weight, labels):
    return F.cross_entropy(hidden @ weight.t(), labels)


def step(loss, hidden, weight, labels):
    return torch.autograd.grad(loss(hidden, weight, labels), (hidden, weight))


def check_fused(vocabulary, features, device):
    """Two whole chunks of tokens and a short one, of the vocabulary and on the device that are timed."""
    hidden, weight, labels = inputs(300, vocabulary, features, device)

    def results(f, *leaves):
        loss = f(*leaves, labels)
        return [loss, *torch.autograd.grad(loss, leaves)]

    mine = results(lambda *tensors: ours(*tensors, chunk_tokens=128), hidden, weight)
    for what, a, b, c in zip(("loss", "hidden's gradient", "weight's gradient"), mine, results(plain, hidden, weight),
                             results(plain, hidden.double(), weight.double())):
        op_race.assert_no_worse(a.detach(), b.detach(), c.detach(), f"{what}, fused")


def given_logits(rows, columns, dtype, device):
    logits = torch.randn(rows, columns, device=device).to(dtype).requires_grad_()
    labels = torch.randint(columns, (rows,), device=device)

    def run(f, x):
        return torch.autograd.grad(f(x, labels[:x.size(0)]), x)[0]

    def check():
        some = logits.detach()[:32].requires_grad_()
        op_race.assert_no_worse(run(cross_entropy, some), run(F.cross_entropy, some), run(F.cross_entropy, some.double()), "gradient of the loss")

    return op_race.Case(f"cross_entropy {str(dtype)[6:]} {rows} x {columns}, both ways",
                        {"ours": lambda: run(cross_entropy, logits), "torch": lambda: run(F.cross_entropy, logits)}, check,
                        3 * logits.numel() * logits.element_size(), {"torch": 1.0})


def cases(args):
    device = torch.device(args.device)
    for dtype in (torch.float32, torch.bfloat16):
        yield given_logits(1024, args.vocabulary, dtype, device)
    hidden, weight, labels = inputs(args.tokens, args.vocabulary, args.features, device)
    yield op_race.Case(f"linear_cross_entropy {args.tokens} x {args.vocabulary}, {args.features} features, both ways",
                       {"ours": lambda: step(ours, hidden, weight, labels), "torch": lambda: step(plain, hidden, weight, labels)},
                       lambda: check_fused(args.vocabulary, args.features, device), 0, {"torch": 1 / 1.1})


def resident_bytes(field):
    """VmRSS: now; VmHWM: at the peak."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))


def measure(name, tokens, vocabulary, features, device):
    """Bytes by which one forward and backward raises this process's peak; a small one comes first, for what libraries set up."""
    f = {"ours": ours, "torch": plain}[name]
    step(f, *inputs(64, 256, features, device))
    leaves = inputs(tokens, vocabulary, features, device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(f, *leaves)
        return torch.cuda.max_memory_allocated() - before
    before = resident_bytes("VmRSS")
    step(f, *leaves)
    return resident_bytes("VmHWM") - before


def memory(tokens, vocabulary, features, device):
    grown = {}
    for name in ("ours", "torch"):
        arguments = json.dumps([name, tokens, vocabulary, features, device])
        out = subprocess.run([sys.executable, __file__, "--measure", arguments], capture_output=True, text=True, check=True).stdout
        grown[name] = int(out.split()[-1])
    ratio = grown["torch"] / grown["ours"]
    print(f"peak memory of linear_cross_entropy: ours {grown['ours'] / 2**20:.0f} MiB, torch {grown['torch'] / 2**20:.0f} MiB, {ratio:.1f} times lower"
          f" (bar 8{'' if ratio >= 8 else ' MISSED'})")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        print(measure(*json.loads(sys.argv[2])))
    else:
        op_race.main(__doc__, cases, tokens=8192, vocabulary=32768, features=512)
        options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
        memory(int(options.get("--tokens", 8192)), int(options.get("--vocabulary", 32768)), int(options.get("--features", 512)),
               options.get("--device", "cpu"))
