# SPDX-License-Identifier: Apache-2.0
"""Who waits for whom, from reports written by hand."""
import json
import os
import subprocess
import sys

import pytest

from deepspeed.comm import flight_record, peer, verdict
from deepspeed.comm.bandwidth import bandwidth, bus_factor


def record(order, kind="reduce_scatter", state="done", phase="reduce", unit=1, step=4, size=64):
    return dict(seq=order + 100, order=order, kind=kind, step=step, phase=phase, unit=unit, bytes=size, start_s=10.0 + order,
                end_s=0.0 if state == "issued" else 10.5 + order, waited_s=0.0, state=state)


def report(rank, records, waiting=None, ranks=(0, 1), group="g"):
    waits = [dict(waiting, group=group, label="shard group over shm", ranks=list(ranks), since_s=20.0)] if waiting else []
    frames = [["train.py", 12 + rank, "main", f"work({rank})"]]
    return dict(rank=rank, world_size=len(ranks), host="a", pid=100 + rank, start_ticks=1, reason="hang", time_s=30.0, step=4, waits=waits,
                groups=[dict(group=group, label="shard group over shm", ranks=list(ranks), records=records)],
                stacks=[dict(thread="MainThread", main=True, frames=frames)])


def test_lists_of_ranks():
    assert verdict.ranks_text([3]) == "rank 3" and verdict.ranks_text([2, 0, 1, 7, 5, 6]) == "ranks 0-2, 5-7"
    assert verdict.ranks_text([4, 1, 2]) == "ranks 1, 2, 4"


def test_a_rank_that_has_not_come():
    last = record(3, state="issued")
    reports = {0: report(0, [record(1), record(2), last], waiting=last), 1: report(1, [record(1), record(2)])}
    text = verdict.compose(reports, {}, 5.0, now_s=30.0, folder="/f")
    assert "rank 1 is not in a collective, it is at train.py:13 in main, while rank 0 waits in reduce_scatter #3" in text
    assert "missing: rank 1" in text and 'File "train.py", line 13, in main' in text and "work(1)" in text
    assert "its last was reduce_scatter #2 (step 4, phase reduce, unit 1, 64 bytes), done 17.5 s ago" in text
    assert "deepspeed.comm.flight_record /f" in text


def test_ranks_that_disagree():
    ours, theirs = record(3, state="issued"), record(3, kind="all_reduce", phase="norm", unit=-1, size=24, state="issued")
    reports = {0: report(0, [record(2), ours], waiting=ours), 1: report(1, [record(1), record(2), theirs], waiting=theirs)}
    said = verdict.headline(reports, {}, 5.0)
    assert "disagree about collective #3" in said
    assert "rank 0 is in reduce_scatter #3 (step 4, phase reduce, unit 1, 64 bytes)" in said
    assert "rank 1 is in all_reduce #3 (step 4, phase norm, 24 bytes)" in said


def test_agreement_and_records_that_are_merely_late():
    assert verdict.divergences({0: report(0, [record(1), record(2)]), 1: report(1, [record(1)])}) == []  # all done: 1 is on its way
    free = dict(record(2), order=0, kind="all_gather", unit=9)  # over shared memory each rank gathers when it likes
    assert verdict.divergences({0: report(0, [record(1), free]), 1: report(1, [free, record(1)])}) == []


def test_silent_and_failed_ranks_come_first():
    last = record(3, state="issued")
    reports = {0: report(0, [last], waiting=last)}
    assert verdict.headline(reports, {1: "process 7 on b is gone"}, 5.0) == "rank 1 does not answer: process 7 on b is gone"


def test_ranks_that_wait_for_each_other_in_different_groups():
    gather, norm = record(5, kind="all_gather", state="issued"), record(2, kind="all_reduce", state="issued", unit=-1, phase="norm")
    reports = {0: report(0, [gather], waiting=gather, group="g"), 1: report(1, [norm], waiting=norm, group="h")}
    text = verdict.compose(reports, {}, 5.0, 30.0)
    assert "rank 0 waits in all_gather #5 (step 4, phase reduce, unit 1, 64 bytes) for rank 1; rank 1 waits in all_reduce #2" in text


def test_equal_stacks_are_shown_once():
    last = record(3, state="issued")
    reports = {r: report(0, [last], waiting=last, ranks=range(4)) for r in range(3)}
    text = verdict.compose(reports, {3: "gone"}, 5.0, 30.0)
    assert text.count('File "train.py"') == 1 and "ranks 0-2" in text


def test_other_processes():
    me = dict(host=__import__("socket").gethostname(), pid=os.getpid(), start_ticks=0)
    assert "is gone" in peer.why_silent(me)  # this number belonged to an earlier process
    assert "look there" in peer.why_silent(dict(me, host="elsewhere")) and "not started" in peer.why_silent(None)
    peer.kill(me)  # not the same process: left alone
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    with open(f"/proc/{child.pid}/stat") as stat:
        ticks = int(stat.read().rpartition(")")[2].split()[19])
    peer.kill(dict(me, pid=child.pid, start_ticks=ticks))
    assert child.wait(timeout=10) == -9


def write(folder, reports):
    for rank, value in reports.items():
        (folder / f"rank{rank}.json").write_text(json.dumps(value))


def test_command_names_the_collective(tmp_path, capsys):
    last = record(3, state="issued")
    write(tmp_path, {0: report(0, [record(2), last], waiting=last), 1: report(1, [record(2)])})
    assert flight_record.main([str(tmp_path), "--last", "2"]) == 1
    out = capsys.readouterr().out
    assert "shard group over shm: rank 0 is in reduce_scatter #3" in out and "rank 1 has not entered it" in out
    assert "2 of 2 ranks left a record" in out and "reduce_scatter #2 (step 4, phase reduce, unit 1, 64 bytes) done in 500.0 ms" in out


def test_command_on_agreement_missing_ranks_and_nonsense(tmp_path, capsys):
    assert flight_record.main([str(tmp_path)]) == 2 and "no rank*.json" in capsys.readouterr().err
    write(tmp_path, {0: report(0, [record(1)], ranks=(0, 1, 2)), 2: report(2, [record(1)], ranks=(0, 1, 2))})
    assert flight_record.main([str(tmp_path)]) == 0
    assert "none of rank 1" in capsys.readouterr().out
    (tmp_path / "rank1.json").write_text('{"rank": 1')
    assert flight_record.main([str(tmp_path)]) == 2 and "rank1.json: not a flight record" in capsys.readouterr().err


@pytest.mark.parametrize("operation, factor", [("all_reduce", 1.5), ("all_gather_into_tensor", 0.75), ("reduce_scatter_tensor", 0.75),
                                               ("all_to_all_single", 0.75), ("broadcast", 1.0), ("send", 1.0)])
def test_bandwidths(operation, factor):
    assert bus_factor(operation, 4) == factor
    rate = bandwidth(operation, 1_000_000, 0.001, 4)
    assert rate.algorithm_gbps == pytest.approx(8.0) and rate.bus_gbps == pytest.approx(8.0 * factor)
    assert bandwidth(operation, 8, 0.0, 4) == (0.0, 0.0)
