# SPDX-License-Identifier: Apache-2.0
"""Spans of time as a Chrome trace (Perfetto and chrome://tracing open it), and the alignment of several hosts' clocks. No torch.

The format: https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU ("X" events with microseconds).
"""
import json
import os
import statistics
from typing import NamedTuple

# In the order in which they are drawn.
TRACKS = ("step", "units forward", "units backward", "gathers", "reductions", "other collectives", "blocked")


class Span(NamedTuple):
    track: str
    name: str
    begin_s: float  # seconds since the Unix epoch on this host's clock
    end_s: float
    args: dict


def clock_offset_s(samples, rank):
    """How far this rank's clock is ahead of rank 0's. samples: for several instants, the time that each rank's clock showed.

    An instant is the end of a barrier; ranks leave it a little apart, each time another one first, so the median is taken.
    """
    return statistics.median(instant[rank] - instant[0] for instant in samples)


def lanes(spans):
    """[(lane, span)]: spans of one track that overlap go to different lanes, as few as possible."""
    ends, placed = [], []
    for span in sorted(spans, key=lambda s: (s.begin_s, -s.end_s)):
        lane = next((i for i, end_s in enumerate(ends) if end_s <= span.begin_s), len(ends))
        if lane == len(ends):
            ends.append(0.0)
        ends[lane] = span.end_s
        placed.append((lane, span))
    return placed


def chrome_trace(spans, rank, label, base_s, offset_s=0.0, **about):
    """The trace of one rank as a dict for JSON; time 0 is `base_s` on rank 0's clock."""
    events = [_meta("process_name", rank, 0, name=f"rank {rank} ({label})"), _meta("process_sort_index", rank, 0, sort_index=rank)]
    thread = 0
    for track in TRACKS:
        by_lane = {}
        for lane, span in lanes([span for span in spans if span.track == track]):
            by_lane.setdefault(lane, []).append(span)
        for lane, members in sorted(by_lane.items()):
            thread += 1
            name = track if lane == 0 else f"{track} ({lane + 1})"
            events += [_meta("thread_name", rank, thread, name=name), _meta("thread_sort_index", rank, thread, sort_index=thread)]
            for span in members:
                events.append({"ph": "X", "pid": rank, "tid": thread, "cat": track, "name": span.name, "args": span.args,
                               "ts": round((span.begin_s - offset_s - base_s) * 1e6, 3),
                               "dur": round(max(0.0, span.end_s - span.begin_s) * 1e6, 3)})
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": dict(about, rank=rank, clock_offset_s=offset_s, base_s=base_s)}


def _meta(what, pid, tid, **args):
    return {"ph": "M", "pid": pid, "tid": tid, "name": what, "args": args}


def write_json(path, value):
    """Whole or not at all."""
    part = f"{path}.{os.getpid()}.part"
    try:
        with open(part, "w") as out:
            json.dump(value, out)
        os.replace(part, path)
    finally:
        if os.path.exists(part):
            os.unlink(part)
