# SPDX-License-Identifier: Apache-2.0
"""Random calls of every operator deepspeed::*: shapes, strides, offsets, dtypes and numbers that fit now and then and are wrong otherwise.

Right is: a result, or a Python exception with a message. Wrong is whatever ends the process (run it by operators.sh, under sanitizers), an
exception that names nothing, or an operator that no call of the run ever satisfied: then its checks were tested and its kernel was not.
The last call is in the file given by --last, for the post-mortem.
"""
import argparse
import collections
import random
import sys
import time

import torch

from deepspeed.ops._library import ops

SIZES = (0, 1, 2, 3, 5, 7, 8, 15, 16, 17, 32, 33, 64, 65, 100, 128, 256, 257)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
OTHERS = (torch.float64, torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool, torch.complex64)
EXPECTED = (ValueError, RuntimeError, NotImplementedError, IndexError, TypeError)


class Draw:
    """The arguments of one call: shapes that belong together, so that a good part of the calls passes the checks."""

    def __init__(self, rng):
        self.rng = rng
        dims = rng.choice((1, 2, 2, 3, 3, 4, 4))
        self.shape = [rng.choice(SIZES[:10] if d < dims - 1 else SIZES) for d in range(dims)]
        self.dtype = rng.choice(FLOATS)
        self.wild = rng.random() < 0.3     # one call in three breaks rules on purpose

    def shapes(self):
        full, rows = self.shape, 1
        for size in full[:-1]:
            rows *= size
        return [full] * 8 + [full[-1:]] * 4 + [full[:-1]] * 2 + [[rows], full[:-1] + [full[-1] * 2], full[:-1] + [full[-1] // 2],
                                                                 [1] * (len(full) - 1) + full[-1:], [full[-1], full[-1]]]

    def tensor(self, plain=0.6):
        rng = self.rng
        shape = list(rng.choice(self.shapes()))
        if self.wild and rng.random() < 0.3:
            shape = [rng.choice(SIZES) for _ in range(rng.randrange(5))]
        dtype = self.dtype if rng.random() < plain else rng.choice(FLOATS + (torch.float32, torch.int64, torch.uint8))
        if self.wild and rng.random() < 0.2:
            dtype = rng.choice(OTHERS)
        return self.fill(self.strided(shape, dtype))

    def strided(self, shape, dtype):
        """An uninitialised tensor of that shape, contiguous or a view that is not."""
        rng, kind = self.rng, self.rng.random()
        if kind < 0.55 or not shape:
            return torch.empty(shape, dtype=dtype)
        if kind < 0.7:    # an odd place in memory
            numel, offset = torch.Size(shape).numel(), rng.randrange(1, 9)
            return torch.empty(numel + offset, dtype=dtype)[offset:].view(shape)
        if kind < 0.8:    # every other column
            return torch.empty(shape[:-1] + [2 * shape[-1]], dtype=dtype)[..., ::2]
        if kind < 0.9 and len(shape) > 1:
            a, b = rng.sample(range(len(shape)), 2)
            swapped = list(shape)
            swapped[a], swapped[b] = swapped[b], swapped[a]
            return torch.empty(swapped, dtype=dtype).transpose(a, b)
        return torch.empty([1] * len(shape), dtype=dtype).expand(shape)   # overlaps itself

    def fill(self, t):
        rng = self.rng
        if t.is_floating_point() or t.is_complex():
            values = torch.randn(t.shape) * rng.choice((0.0, 1.0, 1e-30, 1e30, 100.0))
            if rng.random() < 0.1 and values.numel():
                values.view(-1)[rng.randrange(values.numel())] = rng.choice((float("nan"), float("inf"), -float("inf")))
        else:
            values = torch.randint(0, rng.choice((1, 2, 8, 100)), t.shape) - (1 if rng.random() < 0.2 else 0)
        return t.copy_(values) if 0 not in t.stride() or t.numel() < 2 else t.fill_(1)

    def argument(self, kind, default=None, has_default=False):
        rng, text = self.rng, str(kind)
        if has_default and rng.random() < 0.4:
            return default
        if text.startswith("Optional["):
            return None if rng.random() < 0.5 else self.argument(kind.getElementType())
        if text.startswith("List["):
            return [self.argument(kind.getElementType()) for _ in range(rng.randrange(4))]
        if text == "Tensor":
            return self.tensor()
        if text == "int":
            return rng.choice((0, 1, 2, 3, 4, 8, 32, 64, 128, self.shape[-1], -1) + ((-2**63, 2**63 - 1, 2**31, 10**12) if self.wild else ()))
        if text == "float":
            return rng.choice((0.0, 1.0, 0.5, 1e-5, 0.1) + ((-1.0, float("nan"), float("inf"), 1e308) if self.wild else ()))
        if text == "bool":
            return rng.random() < 0.5
        if text == "str":
            return rng.choice(("half", "none", "gelu", "gelu_tanh", "silu", "relu", "int8", "int4", "fp8_e4m3", "fp8_e5m2", "fp6_e3m2", "mean", "sum", ""))
        raise SystemExit(f"no way to draw an argument of type {text}")


def schemas():
    ops()
    return sorted((s for s in torch._C._jit_get_all_schemas() if s.name.startswith("deepspeed::")), key=lambda s: s.name)


def describe(value):
    if torch.is_tensor(value):
        return f"{value.dtype}{list(value.shape)} strides {list(value.stride())} offset {value.storage_offset()}"
    return repr([describe(v) for v in value]) if isinstance(value, list) else repr(value)


def quantized(rng, chunks):
    """What a quantised tensor consists of, the tensors as lists of `chunks`."""
    shape = [rng.choice(SIZES[:10]), rng.choice(SIZES)]
    format, symmetric = rng.choice((("int8", True), ("int8", False), ("int4", True), ("int4", False), ("fp8_e4m3", True), ("fp6_e3m2", True),
                                    ("fp12_e4m7", True)))
    group = rng.choice((1, 3, 8, 64, 100, 4096))
    parts = [ops().quantize(torch.randn(shape), format, group, symmetric) for _ in range(chunks)]
    data, scale, zero_point = ([p[i] for p in parts] for i in range(3))
    return dict(data=data, scale=scale, zero_point=[] if symmetric else zero_point, shape=shape, format=format, group_size=group)


def one_quantized(rng):
    parts = quantized(rng, 1)
    return {**parts, "data": parts["data"][0], "scale": parts["scale"][0], "zero_point": (parts["zero_point"] or [None])[0]}


def chunks_to_reduce(rng):
    again = dict(dtype=rng.choice(FLOATS), out_format=rng.choice((None, "int8", "fp6_e3m2")), out_symmetric=True, offset=rng.choice((0, 8)))
    return {**quantized(rng, rng.randrange(1, 4)), **again}


def shape_of(rng, last=SIZES):
    return [rng.choice(SIZES[:8]) for _ in range(rng.randrange(3))] + [rng.choice(last)]


def alike(*names, last=SIZES):
    """Tensors of one shape, dtype and layout, and no bias."""
    def fit(rng):
        shape, dtype = shape_of(rng, last), rng.choice(FLOATS)
        return {"bias": None, **{name: torch.randn(shape).to(dtype) for name in names}}
    return fit


def activation(*names, halves=False):
    def fit(rng):
        tensors = alike(*names, last=[2 * size for size in SIZES] if halves else SIZES)(rng)
        if halves and "grad" in tensors:
            tensors["grad"] = tensors["x"].chunk(2, -1)[0].clone()
        fitted = {**tensors, "act": rng.choice(("gelu", "gelu_tanh", "silu", "relu"))}
        if "up" in names:
            del fitted["bias"]
        elif rng.random() < 0.5:
            fitted["bias"] = torch.randn(fitted["x"].shape[-1])
        return fitted
    return fit


def dropout(*names):
    def fit(rng):
        return {**alike(*names)(rng), "state": ops().philox_state(torch.empty(0)), "p": rng.choice((0.0, 0.1, 1.0))}
    return fit


def rotation(rng):
    batch, tokens, heads, size = rng.choice((0, 1, 2)), rng.choice(SIZES[:8]), rng.choice((1, 2, 4)), 2 * rng.choice((1, 3, 4, 16, 33))
    heads_first, dtype, rotary = rng.random() < 0.5, rng.choice(FLOATS), 2 * rng.randrange(1, size // 2 + 1)
    order = (lambda h: [batch, h, tokens, size]) if heads_first else (lambda h: [batch, tokens, h, size])
    tables = [torch.randn(tokens, rotary if rng.random() < 0.5 else rotary // 2) for _ in range(2)]
    tables[1] = torch.randn(tables[0].shape)
    return dict(q=torch.randn(order(heads)).to(dtype), k=torch.randn(order(1)).to(dtype), cos=tables[0], sin=tables[1], positions=None,
                rotary_dim=rotary, interleaved=rng.random() < 0.5, heads_first=heads_first, inverse=rng.random() < 0.5)


def norm_backward(*statistics):
    def fit(rng):
        rows, columns, dtype = rng.choice(SIZES[:10]), rng.choice(SIZES[1:]), rng.choice(FLOATS)
        made = {name: torch.randn(rows, columns).to(dtype) for name in ("dy", "h", "dh")}
        if rng.random() < 0.5:
            made["dh"] = None
        wide = rng.random() < 0.5
        made["weight"] = torch.randn(columns).to(torch.float32 if wide else dtype)
        return {**made, **{name: torch.rand(rows) for name in statistics}, "parameter_dtype": torch.float32 if wide else dtype}
    return fit


def norm(rng):
    columns, dtype = rng.choice(SIZES[1:]), rng.choice(FLOATS)
    made = {name: torch.randn(rng.choice((1, 3)), columns).to(dtype) for name in ("x",)}
    return {**made, "residual": torch.randn(made["x"].shape).to(dtype), "weight": torch.randn(columns).to(dtype), "bias": None, "eps": 1e-5}


def with_format(*names):
    def fit(rng):
        format = rng.choice(("int8", "int4", "fp8_e4m3", "fp8_e5m2", "fp6_e3m2", "fp4_e2m1", "fp12_e4m7"))
        tensors = alike(*names)(rng)
        del tensors["bias"]
        if "residual" in tensors:
            tensors["residual"] = torch.randn(tensors["x"].shape)
        return {**tensors, "format": format, "group_size": rng.choice((1, 3, 8, 64, 100, 4096)), "symmetric": True, "offset": rng.choice((0, 8))}
    return fit


def scaled(rng):
    return {"x": torch.randn(shape_of(rng)), "factor": torch.tensor(rng.choice((0.0, 0.5, 1.0)))}


def probabilities(rng):
    y = torch.rand(shape_of(rng)).to(rng.choice(FLOATS))
    return {"y": y, "grad": torch.randn(y.shape).to(y.dtype), "scale": 0.5, "causal": y.dim() > 1 and rng.random() < 0.5}


def labelled(*names):
    """Logits (or hidden states and a weight) with labels that fit."""
    def fit(rng):
        rows, columns, inner, dtype = rng.choice(SIZES[:10]), rng.choice(SIZES[1:]), rng.choice(SIZES[1:]), rng.choice(FLOATS)
        made = {"logits": torch.randn(rows, columns).to(dtype), "labels": torch.randint(columns, (rows,)), "grad": torch.randn(rows),
                "stats": torch.randn(rows, 2), "hidden": torch.randn(rows, inner).to(dtype), "weight": torch.randn(columns, inner).to(dtype),
                "bias": None, "row_weights": None, "reduction": rng.choice((0, 1, 2)), "label_smoothing": 0.1, "z_loss": 0.0,
                "chunk_tokens": rng.choice((1, 3, 64)), "needs": [rng.random() < 0.5 for _ in range(3)]}
        return {name: made[name] for name in names}
    return fit


# Arguments that must fit each other too closely to be drawn one by one.
_OF_LOGITS = ("logits", "labels", "label_smoothing", "z_loss")
_OF_HIDDEN = ("hidden", "weight", "bias", "labels", "reduction", "label_smoothing", "z_loss", "chunk_tokens")
FITTING = {f"deepspeed::{name}": fit for name, fit in {
    "dequantize": one_quantized, "dequantize_reduce": chunks_to_reduce,
    "bias_act": activation("x"), "bias_act_backward": activation("x", "grad"), "gated": activation("gate", "up"),
    "gated_backward": activation("gate", "up", "grad"), "gated_halves": activation("x", halves=True),
    "gated_halves_backward": activation("x", "grad", halves=True), "dropout_add": dropout("x", "residual"), "dropout_add_backward": dropout("grad"),
    "rope": rotation, "cross_entropy": labelled(*_OF_LOGITS), "cross_entropy_backward": labelled("grad", "stats", *_OF_LOGITS),
    "linear_cross_entropy": labelled(*_OF_HIDDEN),
    "layer_norm": norm, "layer_norm_residual": norm, "rms_norm": norm, "rms_norm_residual": norm,
    "layer_norm_backward": norm_backward("mean", "rstd"), "rms_norm_backward": norm_backward("rstd"),
    "quantize": with_format("x"), "quantize_feedback": with_format("x", "residual"), "fake_quantize": with_format("x"),
    "scaled_masked_softmax_backward": probabilities, "scale_unless_one": scaled,
    "linear_cross_entropy_chunks": labelled("row_weights", "needs", *_OF_HIDDEN),
}.items()}


def attempt(last, number, what, arguments, run):
    """(outcome, exception or None) of run(). `last`, an open file, says what was called with what, whatever becomes of this process."""
    last.seek(0)
    last.truncate()
    last.write(f"call {number}\n{what}\n" + "".join(f"  {name} = {describe(value)}\n" for name, value in arguments.items()))
    last.flush()
    try:
        run()
    except EXPECTED as error:
        if "INTERNAL ASSERT" in str(error):
            raise
        return "refused", error
    return "done", None


def call(schema, number, rng, last):
    """(outcome, exception or None) of one random call."""
    draw = Draw(rng)
    arguments = {a.name: draw.argument(a.type, a.default_value, a.has_default_value()) for a in schema.arguments}
    fit = FITTING.get(schema.name.removesuffix("_"))    # an operator in place takes what the other takes
    if fit is not None and rng.random() < 0.7:
        fitting = {name: value for name, value in fit(rng).items() if name in arguments}
        if draw.wild:
            del fitting[rng.choice(sorted(fitting))]    # one does not fit
        arguments.update(fitting)
    # Backward as well, now and then, of what is differentiable.
    if rng.random() < 0.3 and "backward" not in schema.name and "chunks" not in schema.name:
        for value in arguments.values():
            if torch.is_tensor(value) and value.is_floating_point() and rng.random() < 0.7:
                value.requires_grad_()
    namespace, name = schema.name.split("::")

    def run():
        result = getattr(getattr(getattr(torch.ops, namespace), name), schema.overload_name or "default")(**arguments)
        outputs = [t for t in (result if isinstance(result, (tuple, list)) else [result]) if torch.is_tensor(t) and t.requires_grad]
        if outputs:
            torch.autograd.backward(outputs, [torch.randn_like(t) for t in outputs])

    return attempt(last, number, schema, arguments, run)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first call: a seed's calls are the same in every run")
    parser.add_argument("--only", default="", help="operators whose name contains this")
    parser.add_argument("--last", default="last_call.txt")
    args = parser.parse_args()
    chosen = [s for s in schemas() if args.only in s.name]
    if not chosen:
        sys.exit("no operator has such a name")
    print(f"{len(chosen)} operators, seed {args.seed}", flush=True)
    counts, refusals = collections.Counter(), collections.defaultdict(collections.Counter)
    end, number = time.monotonic() + args.seconds, args.first
    with open(args.last, "w") as last:
        while time.monotonic() < end:
            schema = chosen[number % len(chosen)]
            rng = random.Random(f"{args.seed} {number}")
            torch.manual_seed(number)
            outcome, error = call(schema, number, rng, last)
            counts[schema.name, outcome] += 1
            if error is not None:
                refusals[schema.name][str(error).split("\n")[0][:90]] += 1
            number += 1
    silent = []
    for schema in chosen:
        name = schema.name
        print(f"{name:48s} {counts[name, 'done']:7d} done {counts[name, 'refused']:7d} refused, {len(refusals[name])} messages")
        if "" in refusals[name]:
            silent.append(name)
    never = [s.name for s in chosen if not counts[s.name, "done"]]
    if never or silent:
        sys.exit(f"never satisfied: {never}; refused without a message: {silent}")


if __name__ == "__main__":
    main()
