# SPDX-License-Identifier: Apache-2.0
"""Draws what the CSV monitor wrote: `python -m deepspeed.telemetry.curves runs/first runs/second -o curves.png`.

A panel for every measure, the times of the phases in one; a line for every run. Of noisy measures the running mean is drawn over the
pale points themselves. Needs matplotlib.
"""
import argparse
import math
import sys
from pathlib import Path
from typing import NamedTuple

from deepspeed.telemetry.monitors.csv_files import read_csv

_PREFIX = "Train_Samples_"
_TIME = "elapsed_time_ms_"
_ORDER = ("train_loss", "lr", "loss_scale")
_PHASES = ("forward", "backward", "backward_inner", "backward_allreduce", "step")
_SMOOTHED_FROM = 50  # points
_DASHES = ("-", "--", ":", "-.")


def runs_of(folders):
    """{name of the run: {measure: {step: value}}}; ValueError for a folder without CSV files."""
    found = {}
    for folder in map(Path, folders):
        files = sorted(folder.glob("*.csv"))
        if not files:
            raise ValueError(f"{folder} holds no CSV files; name the directory output_path/job_name of csv_monitor")
        name = folder.name if folder.name not in found else str(folder)
        found[name] = {file.stem.removeprefix(_PREFIX): read_csv(file) for file in files}
    return found


def running_mean(values, width):
    """Mean of the finite ones among each value and its neighbours, `width` // 2 on either side."""
    means = []
    for at in range(len(values)):
        finite = [v for v in values[max(0, at - width // 2):at + width // 2 + 1] if math.isfinite(v)]
        means.append(sum(finite) / len(finite) if finite else math.nan)
    return means


class Line(NamedTuple):
    """One measure of one run. Colour tells the lines of one run apart, or the runs where each has one line; dashes tell runs apart."""
    label: str
    points: dict  # step: value
    colour: int
    run: int


def _in_order(names, first):
    """Those of `first` in that order, then the others by name."""
    return sorted(names, key=lambda name: (first.index(name) if name in first else len(first), name))


def _panels(runs, wanted):
    """[(title, [Line, ...]), ...] in the order in which people look at them."""
    measures = {measure for run in runs.values() for measure in run if not wanted or measure in wanted}
    if not measures:
        have = sorted({measure for run in runs.values() for measure in run})
        raise ValueError(f"none of {', '.join(wanted)} was recorded; there are {', '.join(have)}")
    several = len(runs) > 1
    numbered = list(enumerate(runs.items()))
    plain = _in_order((m for m in measures if not m.startswith(_TIME)), _ORDER)
    panels = [(m, [Line(name if several else "", run[m], number, number) for number, (name, run) in numbered if m in run]) for m in plain]
    times = _in_order((m for m in measures if m.startswith(_TIME)), [_TIME + phase for phase in _PHASES])
    if times:
        panels.append(("time of the phases of an update, ms",
                       [Line(m.removeprefix(_TIME) + (f", {name}" if several else ""), run[m], times.index(m), number)
                        for m in times for number, (name, run) in numbered if m in run]))
    return panels


def _draw_panel(axes, title, lines):
    timed = title.startswith("time")
    crowded = len(lines) > 5
    for label, points, colour, run in lines:
        steps, values = list(points), list(points.values())
        look = {"color": f"C{colour % 10}", "linestyle": _DASHES[run % len(_DASHES)], "linewidth": 1.8, "label": label}
        if title not in ("lr", "loss_scale") and len(values) >= _SMOOTHED_FROM:
            if not crowded:
                axes.plot(steps, values, linewidth=0.8, alpha=0.3, color=look["color"])
            axes.plot(steps, running_mean(values, max(5, len(values) // 20)), **look)
        else:
            axes.plot(steps, values, marker="o" if len(values) < 20 else None, markersize=4, **look)
    axes.set_title(title, fontsize=12)
    axes.set_xlabel("samples")
    axes.grid(alpha=0.25)
    everything = [value for line in lines for value in line.points.values()]
    if title == "loss_scale" or (timed and min(everything) > 0 and max(everything) > 50 * min(everything)):
        axes.set_yscale("log", base=2 if title == "loss_scale" else 10)
    elif title == "lr":
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    if timed:
        axes.legend(fontsize=9, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    elif any(line.label for line in lines):
        axes.legend(fontsize=9, frameon=False)


def draw(folders, output, measures=()):
    """Draws the runs in `folders` (directories of the CSV monitor) into the image `output`; returns its path.

    measures: names to draw, such as "train_loss"; default all.
    """
    runs = runs_of(folders)
    panels = _panels(runs, tuple(measures))
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError(f"drawing curves needs matplotlib ({error}): `pip install matplotlib`") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot
    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = pyplot.figure(figsize=(6.5 * columns, 4 * rows), layout="constrained")
    cells = figure.add_gridspec(rows, columns)
    for number, (title, lines) in enumerate(panels):
        alone = number == len(panels) - 1 and number % columns == 0  # the last one of an odd number has the whole row
        _draw_panel(figure.add_subplot(cells[number // columns, slice(None) if alone else number % columns]), title, lines)
    if len(runs) == 1:
        figure.suptitle(next(iter(runs)), fontsize=13)
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=110)
    pyplot.close(figure)
    return str(output)


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m deepspeed.telemetry.curves", description="Draw what the CSV monitor wrote.")
    parser.add_argument("folders", nargs="+", help="directories output_path/job_name of csv_monitor, one a run")
    parser.add_argument("-o", "--output", default="curves.png", help="image to write (default: curves.png)")
    parser.add_argument("-m", "--measure", action="append", default=[], help="draw this measure only, e.g. train_loss; may be repeated")
    args = parser.parse_args(argv)
    try:
        print(draw(args.folders, args.output, args.measure))
    except (ValueError, ImportError) as error:
        sys.exit(f"curves: {error}")


if __name__ == "__main__":
    main()
