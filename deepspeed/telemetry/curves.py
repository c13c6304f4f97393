# SPDX-License-Identifier: Apache-2.0
"""Draws what the CSV monitor wrote: `python -m deepspeed.telemetry.curves runs/first runs/second -o curves.png`.

A panel for every measure, the times of the phases in one; a line for every run. Of noisy measures the running mean is drawn over the
pale points themselves. Needs matplotlib.
"""
import argparse
import math
import sys
from pathlib import Path

from deepspeed.telemetry.monitors.csv_files import read_csv

_PREFIX = "Train_Samples_"
_TIME = "elapsed_time_ms_"
_ORDER = ("train_loss", "lr", "loss_scale")
_SMOOTHED_FROM = 50  # points


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
    """Mean of each value and up to `width` - 1 before it; values that are not finite are left out."""
    means, window = [], []
    for value in values:
        window.append(value)
        if len(window) > width:
            window.pop(0)
        finite = [v for v in window if math.isfinite(v)]
        means.append(sum(finite) / len(finite) if finite else math.nan)
    return means


def _panels(runs, wanted):
    """[(title, [(label, {step: value}), ...]), ...] in the order in which people look at them."""
    measures = {measure for run in runs.values() for measure in run if not wanted or measure in wanted}
    if not measures:
        have = sorted({measure for run in runs.values() for measure in run})
        raise ValueError(f"none of {', '.join(wanted)} was recorded; there are {', '.join(have)}")
    plain = sorted((m for m in measures if not m.startswith(_TIME)), key=lambda m: (_ORDER.index(m) if m in _ORDER else len(_ORDER), m))
    several = len(runs) > 1
    panels = [(measure, [(name if several else "", run[measure]) for name, run in runs.items() if measure in run]) for measure in plain]
    times = sorted(m for m in measures if m.startswith(_TIME))
    if times:
        panels.append(("time of the phases, ms", [((f"{name}: " if several else "") + m.removeprefix(_TIME), run[m])
                                                  for name, run in runs.items() for m in times if m in run]))
    return panels


def _draw_panel(axes, title, lines):
    noisy = title not in ("lr", "loss_scale")
    for label, points in lines:
        steps, values = list(points), list(points.values())
        if noisy and len(values) >= _SMOOTHED_FROM:
            pale, = axes.plot(steps, values, linewidth=0.8, alpha=0.3)
            axes.plot(steps, running_mean(values, max(5, len(values) // 25)), linewidth=1.8, color=pale.get_color(), label=label)
        else:
            axes.plot(steps, values, linewidth=1.8, label=label, marker="o" if len(values) < 20 else None, markersize=4)
    axes.set_title(title, fontsize=12)
    axes.set_xlabel("samples")
    axes.grid(alpha=0.25)
    everything = [value for _, points in lines for value in points.values()]
    if title == "loss_scale" or (title.startswith("time") and min(everything) > 0 and max(everything) > 50 * min(everything)):
        axes.set_yscale("log", base=2 if title == "loss_scale" else 10)
    elif title == "lr":
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    if any(label for label, _ in lines):
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
    figure, grid = pyplot.subplots(rows, columns, figsize=(6.5 * columns, 4 * rows), squeeze=False, layout="constrained")
    flat = list(grid.flat)
    for axes, (title, lines) in zip(flat, panels):
        _draw_panel(axes, title, lines)
    for axes in flat[len(panels):]:
        axes.set_visible(False)
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
