# SPDX-License-Identifier: Apache-2.0
"""A plan as text and as JSON."""
from deepspeed.planning.plan import KINDS
from deepspeed.planning.quantities import GIB, gib

_HEADINGS = {"parameters": "param-\neters", "gradients": "grad-\nients", "master_weights": "master\nweights",
             "optimizer_state": "optim.\nstate", "gathered_units": "gathered\nunits", "buckets": "buckets"}


def _size(numel):
    return f"{numel / 1e9:.2f} B" if numel >= 1e9 else f"{numel / 1e6:.1f} M" if numel >= 1e6 else f"{numel:,}"


def heading(plan):
    shape = plan.shape
    frozen = f", {_size(shape.numel - shape.trained)} of them frozen" if shape.trained < shape.numel else ""
    where = f"{plan.gpus} {'GPUs' if plan.device == 'cuda' else 'CPU ranks'} on {plan.nodes} node{'s' * (plan.nodes > 1)}"
    state = f"{4 * plan.state_values} bytes of state a parameter"
    lines = [f"{_size(shape.numel)} parameters{frozen}, {plan.precision}, {plan.optimizer} ({state}), {where}",
             f"{plan.units} units are gathered one after the other, the largest of {_size(plan.largest_unit_numel)} parameters; "
             f"{plan.accumulation} micro-batch{'es' * (plan.accumulation > 1)} a step"]
    if shape.assumed:
        lines.append(f"Assumed: {shape.assumed}")
    return lines


def _grid(header, rows):
    """Columns right-aligned but the first; cells of the header may have two lines."""
    tops = [cell.split("\n") for cell in header]
    lines = [[top[i - (2 - len(top))] if i >= 2 - len(top) else "" for top in tops] for i in range(2)] + rows
    widths = [max(len(line[c]) for line in lines) for c in range(len(header))]
    text = ["  ".join([line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:]))]).rstrip() for line in lines]
    return text[:2] + ["-" * max(map(len, text))] + text[2:]


def table(plan, memory_bytes=None, reserved_bytes=0, host_memory_bytes=None):
    """Lines of text: GiB of one rank by kind for every choice, and whether it fits."""
    known = any(c.activation_bytes for c in plan.choices)
    header = ["GiB a rank", *(_HEADINGS[kind] for kind in KINDS), *(["activa-\ntions"] if known else []), "total", "host,\na node",
              "GiB sent\na step"]
    if memory_bytes:
        header.append(f"fits in {memory_bytes / GIB:.0f} GiB?" if known else "left for activations\nand workspace")
    rows = []
    for choice in plan.choices:
        row = [("* " if choice.configured else "  ") + choice.name, *(gib(choice.device[kind]) for kind in KINDS)]
        row += [gib(choice.activation_bytes)] if known else []
        row += [gib(choice.device_bytes), gib(choice.host_bytes), gib(choice.sent_bytes)]
        if memory_bytes:
            misfit = choice.misfit(memory_bytes, reserved_bytes, host_memory_bytes)
            left = gib(memory_bytes - reserved_bytes - choice.device_bytes)
            row.append(f"no: {misfit}" if misfit else f"yes, {left} free" if known else left)
        rows.append(row)
    return _grid(header, rows)


def advice(plan, memory_bytes, reserved_bytes, host_memory_bytes=None):
    """What to take, in a sentence."""
    best = plan.best(memory_bytes, reserved_bytes, host_memory_bytes)
    known = plan.choices[0].activation_bytes > 0
    if best is None or not best.runs:
        least = min((c for c in plan.choices if c.runs), key=lambda c: c.device_bytes)
        lines = [f"Nothing that this release runs fits in {memory_bytes / GIB:.0f} GiB. Least is {least.name} with {gib(least.device_bytes)} "
                 "GiB: use more GPUs, GPUs with more memory, a smaller micro-batch or activation checkpointing."]
        if best is not None:
            host = "" if host_memory_bytes or not best.host_bytes else (
                f", if each node has {gib(best.host_bytes)} GiB of memory to spare (--host_memory checks it)")
            lines.append(f"By formula {best.name} would fit{host}; this release does not run offload yet.")
        return lines
    import json
    left = "" if known else f", which leaves {gib(memory_bytes - reserved_bytes - best.device_bytes)} GiB for activations"
    return [f"Sends least of those that fit: {best.name}{left}.  \"zero_optimization\": {json.dumps(best.settings())}"]


def legend(plan, reserved_bytes, memory_bytes, host_memory_bytes=None):
    lines = ["* what the configuration says." if any(c.configured for c in plan.choices) else ""]
    if any(not c.runs for c in plan.choices):
        unchecked = "" if host_memory_bytes else "; whether the hosts have that memory is not checked without --host_memory"
        lines.append(f"On host or disk: by formula, this release does not run offload yet{unchecked}.")
    if memory_bytes:
        lines.append(f"Kept free in each GPU: {gib(reserved_bytes)} GiB for the CUDA context, NCCL and rounding (--reserved).")
    else:
        lines.append("Give --gpu_memory 80GB to see what fits.")
    if not plan.choices[0].activation_bytes:
        lines.append("Activations are not counted: give --activations 12GB, or --seq_length to have them estimated.")
    return [line for line in lines if line] + [f"Note: {remark}." for remark in plan.remarks]


def as_json(plan):
    """Everything, in bytes."""
    return {
        "parameters": plan.shape.numel, "trained_parameters": plan.shape.trained, "precision": plan.precision, "optimizer": plan.optimizer,
        "gpus": plan.gpus, "nodes": plan.nodes, "units": plan.units, "largest_unit_parameters": plan.largest_unit_numel,
        "micro_batch": plan.micro_batch, "gradient_accumulation_steps": plan.accumulation, "assumed": plan.shape.assumed,
        "remarks": plan.remarks,
        "choices": [{
            "name": c.name, "configured": c.configured, "runs": c.runs, "zero_optimization": c.settings(), "rank_bytes": dict(c.device),
            "rank_host_bytes": dict(c.host), "activation_bytes": c.activation_bytes, "rank_total_bytes": c.device_bytes,
            "node_host_bytes": c.host_bytes, "sent_bytes_a_step": c.sent_bytes,
            "traffic": [dict(zip(("phase", "collectives", "bytes", "sent_bytes"), row)) for row in c.traffic],
        } for c in plan.choices],
    }
