# SPDX-License-Identifier: Apache-2.0
"""The flops profile as text."""
import os
from collections import defaultdict
from typing import NamedTuple

from deepspeed.telemetry.flops.units import duration_to_string, flops_to_string, macs_to_string, number_to_string, params_to_string
from deepspeed.telemetry.logs import logger, print_dist
from deepspeed.telemetry.timers import BACKWARD_GLOBAL_TIMER, STEP_GLOBAL_TIMER

_WIDTH = 110


class Row(NamedTuple):
    """One module of the tree."""
    depth: int
    name: str    # in its parent
    kind: str    # name of its class
    note: str    # its own description, as in print(model)
    params: int
    record: object


def rows_of(profiler):
    """Every module in the order of print(model); one that hangs in several places comes once. A container that is never called itself,
    such as a ModuleList, has its children's sums."""
    from deepspeed.telemetry.flops.profiler import Record, numel_of
    rows, seen = [], set()

    def visit(module, name, depth):
        seen.add(id(module))
        at, record = len(rows), profiler.record_of(module)
        rows.append(None)
        inside = [visit(child, child_name, depth + 1) for child_name, child in module.named_children() if id(child) not in seen]
        if not record.calls:
            record = Record()
            for part in inside:
                record.macs, record.flops = record.macs + part.macs, record.flops + part.flops
                record.latency_s += part.latency_s
        rows[at] = Row(depth, name, type(module).__name__, module.extra_repr(), numel_of(module.parameters()), record)
        return record

    visit(profiler.model, "", 0)
    return rows


def _rate(flops, seconds):
    return flops_to_string(flops / seconds) if seconds > 0 else "-"


def _heading(text):
    return f" {text} ".center(_WIDTH, "-")


def _engine_figures(profiler, flops, forward_s):
    """(label, text) of what only an engine knows: its groups, and the times of the update that was profiled."""
    engine, again = profiler.ds_engine, profiler.recompute_fwd_factor
    micro, gas = engine.train_micro_batch_size_per_gpu(), engine.gradient_accumulation_steps()
    groups = [("world size", engine.world_size), ("data parallel size", engine.dp_world_size),
              ("model parallel size", engine.mp_world_size), ("batch size per GPU", micro), ("micro-batches per update", gas)]
    backward_s, step_s = (engine.timers(name).elapsed(reset=False) / 1000.0 for name in (BACKWARD_GLOBAL_TIMER, STEP_GLOBAL_TIMER))
    backward_s /= gas
    iter_s = gas * (forward_s + backward_s) + step_s
    share = f"{2 + again:g}"
    times = [
        ("bwd latency of a micro-batch", duration_to_string(backward_s)),
        (f"bwd FLOPS per GPU = {share} * fwd flops / bwd latency", _rate((2 + again) * flops, backward_s)),
        (f"fwd+bwd FLOPS per GPU = {3 + again:g} * fwd flops / (fwd+bwd latency)", _rate((3 + again) * flops, forward_s + backward_s)),
        ("step latency", duration_to_string(step_s)),
        ("iter latency = micro-batches * (fwd+bwd latency) + step latency", duration_to_string(iter_s)),
        ("FLOPS per GPU over the iteration", _rate(gas * (3 + again) * flops, iter_s)),
        ("samples/second, all ranks", f"{micro * gas * engine.dp_world_size / iter_s:.2f}" if iter_s > 0 else "-"),
    ]
    return groups, times


def summary(profiler):
    flops, macs, params = profiler.get_total_flops(), profiler.get_total_macs(), profiler.get_total_params()
    forward_s = profiler.get_total_duration()
    groups, times = _engine_figures(profiler, flops, forward_s) if profiler.ds_engine is not None else ([], [])
    ranks = profiler.ds_engine.mp_world_size if profiler.ds_engine is not None else 1
    lines = groups + [
        ("params per GPU", params_to_string(params)),
        ("params of model = params per GPU * mp_size", params_to_string(params * ranks)),
        ("fwd MACs per GPU", macs_to_string(macs)),
        ("fwd flops per GPU", number_to_string(flops)),
        ("fwd flops of model = fwd flops per GPU * mp_size", number_to_string(flops * ranks)),
        ("fwd latency", duration_to_string(forward_s)),
        ("fwd FLOPS per GPU = fwd flops / fwd latency", _rate(flops, forward_s)),
    ] + times
    text = [f"{label + ':':<70}{value}" for label, value in lines]
    if profiler.uncounted:
        found = ", ".join(f"{name} ({calls} calls)" for name, calls in sorted(profiler.uncounted.items()))
        text.append(f"operations without a formula, not in these figures: {found}")
    return "\n".join(text)


def aggregated(profiler, module_depth=-1, top_modules=1):
    """For every depth down to `module_depth` the classes of module with the largest sums."""
    sums = defaultdict(lambda: defaultdict(lambda: [0, 0, 0.0]))
    for row in rows_of(profiler):
        if module_depth < 0 or row.depth <= module_depth:
            total = sums[row.depth][row.kind]
            for index, value in enumerate((row.params, row.record.macs, row.record.latency_s)):
                total[index] += value
    lines = [f"Top {top_modules} kinds of module at each depth, their figures summed:"]
    shown = (("params", params_to_string), ("MACs", macs_to_string), ("fwd latency", duration_to_string))
    for depth, kinds in sorted(sums.items()):
        lines.append(f"depth {depth}:")
        for index, (label, to_text) in enumerate(shown):
            largest = sorted(kinds.items(), key=lambda item: -item[1][index])[:top_modules]
            lines.append(f"    {label:<12}" + ", ".join(f"{kind} {to_text(total[index])}" for kind, total in largest))
    return "\n".join(lines)


def _share(part, whole):
    return f"{100.0 * part / whole:.1f}%" if whole else "-"


def tree(profiler, module_depth=-1):
    """A line for every module down to `module_depth`."""
    rows = rows_of(profiler)
    whole = rows[0]
    cells = [("module", "params", "", "MACs", "", "flops", "fwd latency", "", "FLOPS", "")]
    for row in rows:
        if module_depth >= 0 and row.depth > module_depth:
            continue
        record = row.record
        cells.append(("  " * row.depth + (f"({row.name}) " if row.name else "") + row.kind, params_to_string(row.params),
                      _share(row.params, whole.params), macs_to_string(record.macs), _share(record.macs, whole.record.macs),
                      number_to_string(record.flops), duration_to_string(record.latency_s),
                      _share(record.latency_s, whole.record.latency_s), _rate(record.flops, record.latency_s), row.note.replace("\n", " ")))
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    lines = []
    for row in cells:
        first, *figures, note = row
        figures = [text.rjust(width) for text, width in zip(figures, widths[1:])]
        lines.append("  ".join([first.ljust(widths[0]), *figures, note]).rstrip())
    return "\n".join(lines)


def whole(profiler, profile_step, module_depth, top_modules, detailed):
    parts = [_heading(f"flops profile, step {profile_step}"), summary(profiler),
             _heading("by depth"), aggregated(profiler, module_depth, top_modules)]
    if detailed:
        parts += [_heading("by module"), tree(profiler, module_depth),
                  "A module's figures contain its submodules'. What a module computes itself, and functions it calls, is the difference. "
                  "Latencies leave out the time of counting."]
    return "\n".join([*parts, "-" * _WIDTH])


def write(text, output_file):
    """Into the file; to standard output without one, or with a warning if it cannot be written: no report is worth a training run."""
    if output_file:
        try:
            os.makedirs(os.path.dirname(os.path.abspath(output_file)), exist_ok=True)
            with open(output_file, "w", encoding="utf-8") as out:
                out.write(text + "\n")
            return
        except (OSError, ValueError) as error:  # ValueError: a NUL in the name
            logger.warning_once(f"flops_profiler.output_file: {output_file!r} cannot be written ({error}); the report is printed instead. "
                                "Name a file in a folder that this user may write to")
    print_dist(text)
