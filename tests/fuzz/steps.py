# SPDX-License-Identifier: Apache-2.0
"""Random calls of the optimizer updates over lists of tensors, as operators.py makes them of operators: lists that fit, then one thing in
them broken. What is right and wrong is told there; operators.sh runs both.
"""
import argparse
import collections
import random
import sys
import time

import torch
from operators import FLOATS, SIZES, Draw, attempt

from deepspeed._native import lib

_COMMON = dict(lr=1e-3, weight_decay=0.01)
_BETAS = dict(beta1=0.9, beta2=0.999, eps=1e-8, step=3, bias_correction=True)
# name: (its lists of states, which of them are unsigned codes, numbers)
STEPS = {
    "adam_step": (("exp_avgs", "exp_avg_sqs"), {**_COMMON, **_BETAS, "adamw": True}),
    "lamb_step": (("exp_avgs", "exp_avg_sqs"), {**_COMMON, **_BETAS, "eps_inside_sqrt": False, "min_coeff": 0.01, "max_coeff": 10.0}),
    "lion_step": (("exp_avgs",), {**_COMMON, "beta1": 0.9, "beta2": 0.99}),
    "adagrad_step": (("sums",), {**_COMMON, "eps": 1e-10}),
    "sgd_step": (("momentum_buffers",), {**_COMMON, "momentum": 0.9, "dampening": 0.0, "nesterov": False, "first_step": False}),
}
_UNSIGNED = ("exp_avg_sqs", "sums")
_CODE_BLOCK = 256


def fitting(rng, names, numbers):
    """Arguments that belong together: float, split or stochastic parameters, float or 8-bit states."""
    shapes = [[rng.choice(SIZES[:8]) for _ in range(rng.randrange(2))] + [rng.choice(SIZES + (1000,))] for _ in range(rng.randrange(4))]
    kind, codes = rng.choice(("plain", "plain", "split", "stochastic")), rng.random() < 0.3
    dtype = torch.bfloat16 if kind != "plain" else rng.choice(FLOATS)
    arguments = dict(numbers, grad_scale=rng.choice((1.0, 0.5)), params=[torch.randn(s).to(dtype) for s in shapes])
    arguments["grads"] = [torch.randn(s).to(rng.choice(FLOATS)) for s in shapes]
    scales = []
    for name in names:
        code = torch.uint8 if name in _UNSIGNED else torch.int8
        arguments[name] = [torch.zeros(s, dtype=code) if codes else torch.rand(s).to(rng.choice(FLOATS)) for s in shapes]
        scales.append([torch.zeros((p.numel() + _CODE_BLOCK - 1) // _CODE_BLOCK) for p in arguments["params"]])
    if codes:
        arguments["scales"] = scales
    if kind == "split":
        arguments["low_bits"] = [torch.zeros(s, dtype=torch.int16) for s in shapes]
    if kind == "stochastic":
        arguments["rounding"] = (rng.randrange(2**63), rng.randrange(100), list(range(len(shapes))))
    return arguments


def broken(rng, arguments):
    """One thing in them is another."""
    name = rng.choice(sorted(arguments))
    value = arguments[name]
    if name == "rounding":
        arguments[name] = (value[0], value[1], rng.choice(([], [2**40] * len(value[2]), [-1] * len(value[2]))))
    elif isinstance(value, list) and value:
        lists = value[rng.randrange(len(value))] if name == "scales" else value
        if not lists or rng.random() < 0.3:
            value.append([] if name == "scales" else torch.zeros(3))
        else:
            lists[rng.randrange(len(lists))] = Draw(rng).tensor()
    elif isinstance(value, float):
        arguments[name] = rng.choice((-1.0, 0.0, float("nan"), float("inf"), 1e308))
    elif isinstance(value, int):
        arguments[name] = rng.choice((-1, 0, 2**62))


def call(name, number, rng, last):
    states, numbers = STEPS[name]
    arguments = fitting(rng, states, numbers)
    if rng.random() < 0.6:
        broken(rng, arguments)
    return attempt(last, number, name, arguments, lambda: getattr(lib(), name)(**arguments))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first call: a seed's calls are the same in every run")
    parser.add_argument("--last", default="last_step.txt")
    args = parser.parse_args()
    names, counts, messages = sorted(STEPS), collections.Counter(), collections.defaultdict(set)
    end, number = time.monotonic() + args.seconds, args.first
    with open(args.last, "w") as last:
        while time.monotonic() < end:
            name = names[number % len(names)]
            torch.manual_seed(number)
            outcome, error = call(name, number, random.Random(f"{args.seed} {number}"), last)
            counts[name, outcome] += 1
            if error is not None:
                messages[name].add(str(error).split("\n")[0][:90])
            number += 1
    for name in names:
        print(f"{name:20s} {counts[name, 'done']:7d} done {counts[name, 'refused']:7d} refused, {len(messages[name])} messages")
    wrong = [name for name in names if not counts[name, "done"] or "" in messages[name]]
    if wrong:
        sys.exit(f"never satisfied, or refused without a message: {wrong}")


if __name__ == "__main__":
    main()
