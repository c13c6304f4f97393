# SPDX-License-Identifier: Apache-2.0
"""A plan as text and as JSON."""
import json

from deepspeed.planning.plan import KINDS
from deepspeed.planning.quantities import GIB, gib

_HEADINGS = {"parameters": "param-\neters", "gradients": "grad-\nients", "master_weights": "master\nweights",
             "optimizer_state": "optim.\nstate", "updates_ahead": "in ad-\nvance", "gathered_units": "gathered\nunits", "buckets": "buckets", "staging": "staging"}
# Columns of what rests elsewhere and of what a step moves, shown where some choice has any.
_ELSEWHERE = (("host,\na node", "host_bytes"), ("disk,\na node", "disk_bytes"), ("sent\na step", "sent_bytes"), ("to, from\nhost", "host_link_bytes"),
              ("streamed\ndisk", "streamed_bytes"), ("mapped\ndisk", "mapped_bytes"))


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


def table(plan, room):
    """Lines of text: GiB of one rank by kind for every choice, what rests elsewhere, what a step moves, and whether it fits."""
    known = any(c.activation_bytes for c in plan.choices)
    kinds = [kind for kind in KINDS if any(c.device[kind] for c in plan.choices)]
    elsewhere = [(title, name) for title, name in _ELSEWHERE if name == "sent_bytes" or any(getattr(c, name) for c in plan.choices)]
    header = ["GiB a rank", *(_HEADINGS[kind] for kind in kinds), *(["activa-\ntions"] if known else []), "total", *(title for title, _ in elsewhere)]
    checked = room.device_bytes is not None
    if checked:
        header.append(f"fits in {room.device_bytes / GIB:.0f} GiB?" if known else "left for activations\nand workspace")
    rows = []
    for choice in plan.choices:
        row = [("* " if choice.configured else "  ") + choice.name, *(gib(choice.device[kind]) for kind in kinds)]
        row += [gib(choice.activation_bytes)] if known else []
        row += [gib(choice.device_bytes), *(gib(getattr(choice, name)) for _, name in elsewhere)]
        if checked:
            misfit = choice.misfit(room)
            left = gib(room.device_bytes - room.reserved_bytes - choice.device_bytes)
            row.append(f"no: {misfit}" if misfit else f"yes, {left} free" if known else left)
        rows.append(row)
    return _grid(header, rows)


def advice(plan, room):
    """What to take, in a sentence."""
    if room.device_bytes is None:
        return []
    best = plan.best(room)
    if best is None:
        least = min((c for c in plan.choices if not c.refused), key=lambda c: c.device_bytes)
        return [f"Nothing fits in {room.device_bytes / GIB:.0f} GiB. Least is {least.name} with {gib(least.device_bytes)} GiB"
                f"{_beside(least)}: use more GPUs, GPUs with more memory, a smaller micro-batch or activation checkpointing."
                if least.misfit(room) and plan.device != "cpu" else
                f"Nothing fits in {room.device_bytes / GIB:.0f} GiB a rank. Least is {least.name} with {gib(least.device_bytes)} GiB{_beside(least)}."]
    known = plan.choices[0].activation_bytes > 0
    left = "" if known else f", which leaves {gib(room.device_bytes - room.reserved_bytes - best.device_bytes)} GiB for activations"
    unknown = [f"{gib(size)} GiB on {where} ({option} checks it)" for size, room_bytes, where, option in (
        (best.host_bytes, room.host_bytes, "each host", "--host_memory"), (best.disk_bytes, room.disk_bytes, "each node's disk", "--disk"))
        if size and room_bytes is None]
    lines = [f"Cheapest of those that fit: {best.name}{left}.  \"zero_optimization\": {json.dumps(best.settings())}"]
    if unknown:
        lines.append(f"It also needs {' and '.join(unknown)}.")
    return lines


def _beside(choice):
    places = [f"{gib(size)} GiB {where}" for size, where in ((choice.host_bytes, "on each host"), (choice.disk_bytes, "on each disk")) if size]
    return f" beside {' and '.join(places)}" if places else ""


def legend(plan, room):
    lines = ["* what the configuration says." if any(c.configured for c in plan.choices) else ""]
    if any(c.disk_bytes for c in plan.choices):
        lines.append("Disk: the optimizer's step streams its state past the page cache; gradients and parameters there are mapped, and reach the disk as "
                     "far as memory has no room for them.")
    if plan.device == "cpu" and any("cpu" in (c.offload_optimizer, c.offload_param) for c in plan.choices):
        lines.append("On a CPU the host is the device: device \"cpu\" moves nothing.")
    if room.device_bytes is not None and plan.device != "cpu":
        lines.append(f"Kept free in each GPU: {gib(room.reserved_bytes)} GiB for the CUDA context, NCCL and rounding (--reserved).")
    elif room.device_bytes is None:
        lines.append("Give --gpu_memory 80GB, or --here, to see what fits.")
    if not plan.choices[0].activation_bytes:
        lines.append("Activations are not counted: give --activations 12GB, or --seq_length to have them estimated.")
    return [line for line in lines if line] + [f"Note: {remark}." for remark in plan.remarks]


def as_json(plan, room):
    """Everything, in bytes. `fits`: null where nothing says how much memory there is."""
    checked = room.device_bytes is not None
    best = plan.best(room) if checked else None
    return {
        "parameters": plan.shape.numel, "trained_parameters": plan.shape.trained, "precision": plan.precision, "optimizer": plan.optimizer,
        "gpus": plan.gpus, "nodes": plan.nodes, "units": plan.units, "largest_unit_parameters": plan.largest_unit_numel,
        "micro_batch": plan.micro_batch, "gradient_accumulation_steps": plan.accumulation, "assumed": plan.shape.assumed,
        "remarks": plan.remarks, "room": room._asdict(),
        "choices": [{
            "name": c.name, "configured": c.configured, "fits": not c.misfit(room) if checked else None, "misfit": c.misfit(room),
            "cheapest": c is best, "zero_optimization": c.settings(), "rank_bytes": dict(c.device), "rank_host_bytes": dict(c.host),
            "rank_file_bytes": dict(c.file), "activation_bytes": c.activation_bytes, "rank_total_bytes": c.device_bytes,
            "node_host_bytes": c.host_bytes, "node_disk_bytes": c.disk_bytes, "sent_bytes_a_step": c.sent_bytes,
            "tier_bytes_a_step": dict(c.tiers),
            "traffic": [dict(zip(("phase", "collectives", "bytes", "sent_bytes"), row)) for row in c.traffic],
        } for c in plan.choices],
    }
