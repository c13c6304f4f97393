# SPDX-License-Identifier: Apache-2.0
"""A plan as a picture: for every choice one bar of device memory by kind, and beside it what rests on the host and the disk."""
from deepspeed.planning.plan import KINDS
from deepspeed.planning.quantities import GIB

_COLOURS = {"parameters": "#4878a8", "gradients": "#e49444", "master_weights": "#85b6b2", "optimizer_state": "#6a9f58",
            "gathered_units": "#a87c9f", "buckets": "#d1615d", "staging": "#f1ce63", "activations": "#b8b0ac"}


def draw(plan, path, memory_bytes=None, title=""):
    """Writes PNG (or what the ending of `path` says). ModuleNotFoundError says what to install when matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("a picture needs matplotlib: pip install matplotlib") from error
    elsewhere = [c for c in plan.choices if c.host_bytes or c.disk_bytes]
    figure = Figure(figsize=(13 if elsewhere else 10, 0.5 * len(plan.choices) + 1.8), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2)) if elsewhere else [figure.subplots()]
    _device_bars(panels[0], plan, memory_bytes)
    if elsewhere:
        _other_bars(panels[1], plan)
    panels[0].invert_yaxis()
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=10)
    figure.legend(loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    figure.savefig(path, dpi=130)


def _device_bars(axes, plan, memory_bytes):
    names = [c.name for c in plan.choices]
    left = [0.0] * len(names)
    for kind in (*KINDS, "activations"):
        widths = [(c.activation_bytes if kind == "activations" else c.device[kind]) / GIB for c in plan.choices]
        if any(widths):
            axes.barh(names, widths, left=left, color=_COLOURS[kind], label=kind.replace("_", " "), height=0.7)
        left = [a + b for a, b in zip(left, widths)]
    _totals(axes, left)
    if memory_bytes:
        axes.axvline(memory_bytes / GIB, color="black", linestyle="--", linewidth=1)
        axes.annotate(f"{memory_bytes / GIB:.0f} GiB", (memory_bytes / GIB, 1), xycoords=("data", "axes fraction"), xytext=(3, -10),
                      textcoords="offset points", fontsize=9)
    axes.set_xlim(0, 1.1 * max(left + [memory_bytes / GIB if memory_bytes else 0]))
    axes.set_xlabel("GiB a rank, on its device")


def _other_bars(axes, plan):
    left = [0.0] * len(plan.choices)
    for name, colour in (("host", "#9ecae1"), ("disk", "#c7b299")):
        widths = [getattr(c, f"{name}_bytes") / c.ranks_per_node / GIB for c in plan.choices]
        if any(widths):
            axes.barh([c.name for c in plan.choices], widths, left=left, color=colour, label=f"on {name}", height=0.7)
        left = [a + b for a, b in zip(left, widths)]
    _totals(axes, left)
    axes.set_xlim(0, 1.15 * max(left))
    axes.set_xlabel("GiB a rank, elsewhere")


def _totals(axes, totals):
    for row, total in enumerate(totals):
        if total:
            axes.annotate(f"{total:.1f}", (total, row), xytext=(4, 0), textcoords="offset points", va="center", fontsize=9)
