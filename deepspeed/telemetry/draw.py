# SPDX-License-Identifier: Apache-2.0
"""`python -m deepspeed.telemetry.draw FOLDER`: the timeline and the memory by rank that the `timeline` option has recorded, as PNG."""
import argparse
import json
import re
import sys
from pathlib import Path

from deepspeed.telemetry.trace import TRACKS

COLOURS = {"forward": "#4878a8", "backward": "#c06030", "step": "#609050", "units forward": "#85aed4", "units backward": "#e0a070",
           "gathers": "#8060a0", "reductions": "#b04060", "other collectives": "#808080", "blocked": "#303030"}
MOST_RANKS = 8
_GB = 1e9


class NothingToDraw(RuntimeError):
    """The folder holds no traces, or matplotlib is missing."""


def _load(folder, kind):
    """{rank: parsed file} of folder/<kind>_rank<r>.json."""
    found = {}
    for path in Path(folder).glob(f"{kind}_rank*.json"):
        match = re.fullmatch(rf"{kind}_rank(\d+)\.json", path.name)
        if match:
            try:
                found[int(match.group(1))] = json.loads(path.read_text())
            except json.JSONDecodeError as error:
                raise NothingToDraw(f"{path} is not JSON: {error}") from None
    return dict(sorted(found.items()))


def _pyplot():
    try:
        import matplotlib
    except ImportError:
        raise NothingToDraw("drawing needs matplotlib: pip install matplotlib. The trace files open in https://ui.perfetto.dev "
                            "without it") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot
    return pyplot


def _spans(trace, step=None):
    spans = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    return spans if step is None else [event for event in spans if event["args"].get("step") == step]


def _steps(traces):
    return sorted({event["args"].get("step", -1) for trace in traces.values() for event in _spans(trace)} - {-1})


def _window(traces, step):
    """First and last microsecond of a step on any rank, from the phases of the training loop."""
    phases = [event for trace in traces.values() for event in _spans(trace, step) if event["cat"] == "step"]
    return min(event["ts"] for event in phases), max(event["ts"] + event["dur"] for event in phases)


def _lane_names(trace):
    """{thread: (track, lane)} in the order of drawing."""
    threads = {event["tid"]: event["args"]["name"] for event in trace["traceEvents"] if event["name"] == "thread_name"}
    split = {tid: re.fullmatch(r"(.*?)(?: \((\d+)\))?", name).groups() for tid, name in threads.items()}
    return {tid: (track, int(lane or 1)) for tid, (track, lane) in split.items()}


def draw_timeline(folder, path, step=None):
    """One traced step (the last, unless `step` says which) of every rank: a row for each track, the same clock for all."""
    pyplot = _pyplot()
    traces = _load(folder, "trace")
    steps = _steps(traces)
    if not steps:
        raise NothingToDraw(f"no trace_rank*.json with a step in {folder}")
    step = steps[-1] if step is None else step
    if step not in steps:
        raise NothingToDraw(f"step {step} was not traced; these were: {', '.join(map(str, steps))}")
    begin, end = _window(traces, step)
    shown = list(traces)[:MOST_RANKS]
    rows = {rank: [track for track in TRACKS if any(event["cat"] == track for event in _spans(traces[rank]))] for rank in shown}
    heights = [max(1, len(rows[rank])) for rank in shown]
    figure, axes = pyplot.subplots(len(shown), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights},
                                   figsize=(15, 1.2 + 0.36 * sum(heights) + 0.3 * len(shown)), layout="constrained")
    for axis, rank in zip(axes[:, 0], shown):
        _draw_rank(axis, traces[rank], rows[rank], begin, end)
        axis.set_title(f"rank {rank}", loc="left", fontsize=10, fontweight="bold", pad=3)
    axes[-1, 0].set_xlabel(f"milliseconds since the beginning of step {step}")
    left_out = f"; ranks {MOST_RANKS}-{max(traces)} are not shown" if len(traces) > MOST_RANKS else ""
    figure.suptitle(f"step {step}: {(end - begin) / 1e3:.1f} ms on {len(traces)} ranks{left_out}", fontsize=12)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path


def _draw_rank(axis, trace, tracks, begin, end):
    lane_of = _lane_names(trace)
    depth = {track: max([lane for name, lane in lane_of.values() if name == track] or [1]) for track in tracks}
    for event in _spans(trace):
        track, lane = lane_of[event["tid"]]
        if track not in depth or event["ts"] > end or event["ts"] + event["dur"] < begin:
            continue
        row, height = len(tracks) - 1 - tracks.index(track), 0.84 / depth[track]
        low = row - 0.42 + (depth[track] - lane) * height
        x, width = (event["ts"] - begin) / 1e3, event["dur"] / 1e3
        colour = COLOURS.get(event["name"] if track == "step" else track, "#606060")
        axis.broken_barh([(x, max(width, (end - begin) / 1e3 / 700))], (low, height * 0.94), facecolors=colour, edgecolors="white",
                         linewidth=0.4 if width > (end - begin) / 1e3 / 100 else 0)
        label = event["name"]
        # Only what fits: a character is about 0.55 % of the width at this size.
        if height > 0.6 and width > len(label) * 0.0062 * (end - begin) / 1e3:
            axis.text(x + width / 2, row, label, ha="center", va="center", fontsize=7, color="white", clip_on=True)
    axis.set_yticks(range(len(tracks)), list(reversed(tracks)), fontsize=8)
    axis.set_ylim(-0.6, len(tracks) - 0.4)
    axis.set_xlim(0, (end - begin) / 1e3)
    axis.grid(axis="x", color="#dddddd", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.tick_params(axis="y", length=0)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)


def _draw_memory_rank(axis, record, device):
    for key, label, style, colour in _series(device):
        points = [(sample["t_s"] * 1e3, sample[key] / _GB) for sample in record["samples"] if sample.get(key) is not None]
        if points:
            axis.plot(*zip(*points), style, label=label, color=colour, linewidth=1.3, markersize=3)


def _series(device):
    if device == "cpu":
        return (("rss_bytes", "resident (RSS)", "-", "#4878a8"),
                ("pss_bytes", "resident, shared pages divided among their users (PSS)", "o--", "#c06030"))
    return ("reserved_bytes", "reserved by the allocator", "-", "#85aed4"), ("allocated_bytes", "allocated", "-", "#c06030")


def draw_memory(folder, path):
    """Memory of every rank over the traced steps, with the phases in the background."""
    pyplot = _pyplot()
    records = _load(folder, "memory")
    if not any(record["samples"] for record in records.values()):
        raise NothingToDraw(f"no memory_rank*.json with samples in {folder}")
    traces = _load(folder, "trace")
    shown = list(records)[:MOST_RANKS]
    figure, axes = pyplot.subplots(len(shown), 1, sharex=True, sharey=True, squeeze=False, figsize=(13, 1.4 + 2.0 * len(shown)),
                                   layout="constrained")
    for axis, rank in zip(axes[:, 0], shown):
        _shade(axis, traces.get(rank))
        _draw_memory_rank(axis, records[rank], records[rank]["device"])
        axis.set_title(f"rank {rank}: {_peaks(records[rank])}", loc="left", fontsize=10, pad=3)
        axis.set_ylabel("GB")
        axis.grid(color="#e4e4e4", linewidth=0.6)
        axis.set_axisbelow(True)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    axes[-1, 0].set_xlabel("milliseconds since tracing began")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    from matplotlib.patches import Patch
    if traces:
        handles += [Patch(color=COLOURS[phase], alpha=0.18) for phase in ("forward", "backward", "step")]
        labels += ["forward", "backward", "step"]
    figure.legend(handles, labels, loc="outside upper center", ncol=5, fontsize=9, frameon=False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path


def _peaks(record):
    peaks = []
    for key, label, _, _ in _series(record["device"]):
        values = [sample[key] for sample in record["samples"] if sample.get(key) is not None]
        if values:
            short = key.partition("_")[0].upper() if record["device"] == "cpu" else label
            peaks.append(f"highest {short} {max(values) / _GB:.2f} GB")
    return ", ".join(peaks)


def _shade(axis, trace):
    for event in _spans(trace) if trace else ():
        if event["cat"] == "step" and event["name"] in ("forward", "backward", "step"):
            axis.axvspan(event["ts"] / 1e3, (event["ts"] + event["dur"]) / 1e3, color=COLOURS[event["name"]], alpha=0.13, linewidth=0)


def main(argv=None):
    parser = argparse.ArgumentParser(prog="deepspeed.telemetry.draw", description="Timeline and memory by rank as PNG.")
    parser.add_argument("folder", help="what timeline.folder of the configuration named")
    parser.add_argument("--step", type=int, default=None, help="which traced step to draw; default: the last")
    parser.add_argument("--output", default=None, metavar="DIR", help="where timeline.png and memory.png go; default: the folder itself")
    args = parser.parse_args(argv)
    output = Path(args.output or args.folder)
    try:
        output.mkdir(parents=True, exist_ok=True)
        print(draw_timeline(args.folder, output / "timeline.png", args.step))
        print(draw_memory(args.folder, output / "memory.png"))
    except NothingToDraw as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
