# SPDX-License-Identifier: Apache-2.0
"""The trace format, lanes and clocks; and the pictures drawn from written traces."""
import json
import os

import pytest

from deepspeed.telemetry import draw
from deepspeed.telemetry.memory import process_memory
from deepspeed.telemetry.trace import Span, chrome_trace, clock_offset_s, lanes, write_json


def span(track, name, begin, end, step=2):
    return Span(track, name, 100.0 + begin, 100.0 + end, {"step": step})


def test_overlapping_spans_get_lanes_of_their_own():
    a, b, c, d = span("gathers", "a", 0, 2), span("gathers", "b", 1, 3), span("gathers", "c", 2, 4), span("gathers", "d", 2.5, 2.6)
    assert [(lane, s.name) for lane, s in lanes([d, c, b, a])] == [(0, "a"), (1, "b"), (0, "c"), (2, "d")]


def test_chrome_events():
    trace = chrome_trace([span("step", "forward", 1, 3), span("gathers", "g", 1, 2), span("gathers", "h", 1.5, 2.5)], 3, "host", 100.0,
                         offset_s=0.25, device="cpu")
    events = [e for e in trace["traceEvents"] if e["ph"] == "X"]
    assert {e["name"]: (e["ts"], e["dur"]) for e in events} == {"forward": (750000.0, 2000000.0), "g": (750000.0, 1000000.0),
                                                                "h": (1250000.0, 1000000.0)}
    assert all(e["pid"] == 3 for e in trace["traceEvents"]) and len({e["tid"] for e in events}) == 3
    names = [e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "thread_name"]
    assert names == ["step", "gathers", "gathers (2)"]
    assert trace["otherData"] == {"device": "cpu", "rank": 3, "clock_offset_s": 0.25, "base_s": 100.0}


def test_clock_offset_is_the_median():
    # Rank 1's clock is 5 s ahead; once rank 0, twice rank 1 left the barrier late.
    samples = [(10.0, 15.0), (20.3, 25.0), (30.0, 35.2), (40.0, 45.0), (50.0, 55.9)]
    assert clock_offset_s(samples, 1) == pytest.approx(5.0) and clock_offset_s(samples, 0) == 0.0


def test_files_are_whole_or_absent(tmp_path):
    path = tmp_path / "x.json"
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert os.listdir(tmp_path) == []
    write_json(path, {"a": 1})
    assert json.loads(path.read_text()) == {"a": 1} and os.listdir(tmp_path) == ["x.json"]


def test_memory_of_this_process():
    held = process_memory()
    assert held["rss_bytes"] >= held["pss_bytes"] * 0.5 > 1e6 and set(process_memory(thorough=False)) == {"rss_bytes"}


def written(folder, ranks=2):
    for rank in range(ranks):
        spans = []
        for step in (2, 3):
            at = 10.0 * step
            spans += [span("step", "forward", at, at + 3, step), span("step", "backward", at + 3, at + 8, step),
                      span("step", "step", at + 8, at + 9, step), span("units forward", "block", at, at + 1, step),
                      span("gathers", "gather_forward", at, at + 1.5, step), span("gathers", "gather_forward", at + 1, at + 2, step)]
        write_json(folder / f"trace_rank{rank}.json", chrome_trace(spans, rank, "host", 100.0))
        samples = [{"t_s": 20.0 + i, "rss_bytes": (1 + i % 3) * 1e9, "pss_bytes": 0.8e9 if i % 2 else None} for i in range(10)]
        write_json(folder / f"memory_rank{rank}.json", {"rank": rank, "host": "h", "device": "cpu", "samples": samples})


def test_pictures(tmp_path, capsys):
    written(tmp_path, ranks=10)
    assert draw.main([str(tmp_path), "--output", str(tmp_path / "out")]) == 0
    for name in ("timeline.png", "memory.png"):
        data = (tmp_path / "out" / name).read_bytes()
        assert data.startswith(b"\x89PNG") and len(data) > 10_000
    assert draw.main([str(tmp_path), "--step", "7"]) == 1 and "these were: 2, 3" in capsys.readouterr().err


def test_memory_of_an_accelerator(tmp_path):
    write_json(tmp_path / "memory_rank0.json", {"rank": 0, "host": "h", "device": "cuda", "samples": [
        {"t_s": i, "allocated_bytes": i * 1e9, "reserved_bytes": 4e9} for i in range(4)]})
    assert draw.draw_memory(tmp_path, tmp_path / "m.png").read_bytes().startswith(b"\x89PNG")
    assert draw._peaks(json.loads((tmp_path / "memory_rank0.json").read_text())) == "highest reserved by the allocator 4.00 GB, " \
                                                                                     "highest allocated 3.00 GB"


def test_nothing_to_draw(tmp_path, capsys):
    assert draw.main([str(tmp_path)]) == 1 and "no trace_rank*.json" in capsys.readouterr().err
    (tmp_path / "trace_rank0.json").write_text("{")
    assert draw.main([str(tmp_path)]) == 1 and "is not JSON" in capsys.readouterr().err


def test_without_matplotlib(tmp_path, monkeypatch, capsys):
    written(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    assert draw.main([str(tmp_path)]) == 1 and "pip install matplotlib" in capsys.readouterr().err
