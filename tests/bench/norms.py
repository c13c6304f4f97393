# SPDX-License-Identifier: Apache-2.0
"""Layer norm and RMS norm, forward and backward, plain and with a residual, against torch eager and Hugging Face's way of writing RMS norm.

    python tests/bench/norms.py --threads 2 [--device cuda] [--only "rms backward bf16"] [--out norms.json]

The copy moves what the norm must move: forward reads x and writes y (with a residual: reads two, writes two); backward reads dy and h and
writes dx (with a residual it also reads the gradient of h). Bars on the CPU: forward as fast as torch, backward 1.5 times as fast; on a GPU
0.9 of a large copy's rate, and 1.3 times as fast as torch.compile where that is far from it.
"""
import torch
import torch.nn.functional as F
from op_race import COMPILED, SHARE_BAR, Case, assert_no_worse, identity, in_a_graph, later, main, with_compiled

from deepspeed.ops.normalization import layer_norm, rms_norm

COLUMNS = (256, 1024, 4096, 16384)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LAYER_EPS, RMS_EPS = 1e-5, 1e-6


def ours(kind, x, residual, weight, bias):
    columns = weight.numel()
    out = layer_norm(x, columns, weight, bias, LAYER_EPS, residual) if kind == "layer" else rms_norm(x, weight, RMS_EPS, residual)
    return out if residual is not None else (out,)


def theirs(kind, x, residual, weight, bias):
    h = x if residual is None else x + residual
    y = F.layer_norm(h, weight.shape, weight, bias, LAYER_EPS) if kind == "layer" else F.rms_norm(h, weight.shape, weight, RMS_EPS)
    return (y,) if residual is None else (y, h)


def llama(kind, x, residual, weight, bias):
    h = x if residual is None else x + residual
    wide = h.float()
    y = weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + RMS_EPS)).to(x.dtype)
    return (y,) if residual is None else (y, h)


class Problem:
    """One norm of one shape: inputs, gradients of the outputs, and what each way of computing it gives."""

    def __init__(self, kind, with_residual, dtype, rows, columns, device):
        self.kind = kind
        random = [torch.randn(rows, columns, device=device) for _ in range(4 if with_residual else 2)]
        self.x, *rest = (t.to(dtype) for t in random)
        self.residual = rest.pop(0) if with_residual else None
        self.grads = rest
        self.weight, self.bias = ((1 + 0.1 * torch.randn(columns, device=device)).to(dtype) for _ in range(2))
        trained = (self.x, self.residual, self.weight, self.bias if kind == "layer" else None)
        self.trained = trained
        self.leaves = [t.requires_grad_() for t in trained if t is not None]

    def inputs(self, convert=lambda t: t):
        return [self.kind] + [None if t is None else convert(t) for t in (self.x, self.residual, self.weight, self.bias)]

    def forward(self, way):
        arguments = self.inputs()

        def body():
            with torch.no_grad():
                return way(*arguments)
        return body

    def backward(self, way):
        """In a model: the gradients of the outputs are nobody else's."""
        given = [t is not None for t in self.trained]

        def function(*leaves):
            leaves = iter(leaves)
            arguments = [next(leaves) if there else None for there in given]
            return tuple(way(self.kind, *arguments[:3], self.bias if arguments[3] is None else arguments[3]))
        return in_a_graph(function, self.leaves)

    def shared(self):
        return in_a_graph(identity, self.grads)

    def backward_of_held(self, way):
        """The caller keeps the gradients of the outputs."""
        def make():
            outputs = way(*self.inputs())
            return lambda: torch.autograd.grad(outputs, self.leaves, self.grads, retain_graph=True)
        return later(make)

    def check(self):
        """Of few rows: the fp64 run is slow, and every row is computed alike."""
        rows = min(256, self.x.shape[0])
        results = []
        for way, dtype in ((ours, self.x.dtype), (theirs, self.x.dtype), (theirs, torch.float64)):
            arguments = self.inputs(lambda t: (t[:rows] if t.dim() == 2 else t).detach().to(dtype).requires_grad_())  # noqa: B023
            outputs = way(*arguments)
            leaves = [t for t in arguments[1:] if t is not None and not (t is arguments[4] and self.kind == "rms")]
            results.append([*outputs, *torch.autograd.grad(outputs, leaves, [g[:rows].to(dtype) for g in self.grads])])
        for i, (mine, peer, exact) in enumerate(zip(*results)):
            assert_no_worse(mine.detach(), peer.detach(), exact.detach(), f"result {i}")


def cases(args):
    on_cpu = args.device == "cpu"
    for kind in ("layer", "rms"):
        for with_residual in (False, True):
            for name, dtype in DTYPES.items():
                for columns in COLUMNS:
                    torch.manual_seed(0)
                    rows = max(1, (args.elements if on_cpu else 32 * args.elements) // columns)
                    problem = Problem(kind, with_residual, dtype, rows, columns, args.device)
                    ways = with_compiled(args, {"ours": ours, "torch": theirs} | ({"llama": llama} if kind == "rms" else {}))
                    array = problem.x.numel() * problem.x.element_size()
                    label = f"{name} {rows}x{columns}" + (" +residual" if with_residual else "")

                    def bars(least):
                        return {way: least for way in ways if way != COMPILED} if on_cpu else {**SHARE_BAR, COMPILED: 1.3}  # noqa: B023
                    yield Case(f"{kind} forward {label}", {w: problem.forward(f) for w, f in ways.items()}, problem.check,
                               array * (4 if with_residual else 2), bars(1.0))
                    moved = array * (4 if with_residual else 3)
                    yield Case(f"{kind} backward {label}", {w: problem.backward(f) for w, f in ways.items()}, problem.check, moved, bars(1.5),
                               problem.shared())
                    yield Case(f"{kind} held backward {label}", {w: problem.backward_of_held(f) for w, f in ways.items()}, problem.check, moved,
                               bars(1.5))


if __name__ == "__main__":
    main(__doc__, cases, elements=2**22)
