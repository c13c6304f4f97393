# SPDX-License-Identifier: Apache-2.0
"""What the engine says when it is asked to, and that it neither speaks nor waits when it is not."""
import io
import logging
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from deepspeed.device import get_accelerator
from deepspeed.telemetry.logs import logger
from deepspeed.telemetry.monitors import read_csv
from deepspeed.telemetry.timers import NoopTimer
from tests.parity.launch import on_ranks, run
from tests.parity.tiny import batch, config, engine_of, tiny, train

TIMES = ("forward", "backward", "backward_inner", "backward_allreduce", "step")


class Ear(logging.Handler):
    """What the logger's own handler lets through on this rank."""

    def __enter__(self):
        self.said = []
        self.addFilter(logger.handlers[0].filters[0])
        logger.addHandler(self)
        return self.said

    def __exit__(self, *_):
        logger.removeHandler(self)

    def emit(self, record):
        self.said.append(record.getMessage())


def csv_section(folder):
    return {"csv_monitor": {"enabled": True, "output_path": str(folder), "job_name": "job"}}


@on_ranks(2)
@pytest.mark.parametrize("stage", [0, 3])
def test_events_are_those_dashboards_expect(tmp_path, stage):
    engine = engine_of(tiny(), config(stage, gradient_accumulation_steps=2, wall_clock_breakdown=True, **csv_section(tmp_path)))
    losses = train(engine, 6)
    engine.destroy()
    dist.barrier()
    found = {path.stem: read_csv(path) for path in (tmp_path / "job").glob("*.csv")}
    assert sorted(found) == sorted(["Train_Samples_train_loss", "Train_Samples_lr"] + [f"Train_Samples_elapsed_time_ms_{t}" for t in TIMES])
    if dist.get_rank() == 0:  # rank 0's losses, averaged over the micro-batches of an update; 8 samples each
        means = {8 * (n + 1): (losses[2 * n] + losses[2 * n + 1]) / 2 for n in range(3)}
        assert found["Train_Samples_train_loss"] == pytest.approx(means, rel=1e-6)
        assert found["Train_Samples_lr"] == {8: 1e-2, 16: 1e-2, 24: 1e-2}
        ms = {name: found[f"Train_Samples_elapsed_time_ms_{name}"] for name in TIMES}
        for step in (8, 16, 24):
            assert 0 < ms["backward_inner"][step] + ms["backward_allreduce"][step] <= ms["backward"][step]
            assert ms["forward"][step] > 0 and ms["step"][step] > 0


@on_ranks(1)
def test_loss_scale_is_an_event_under_fp16(tmp_path):
    engine = engine_of(tiny(), config(0, fp16={"enabled": True, "initial_scale_power": 4}, **csv_section(tmp_path)))
    train(engine, 2)
    assert read_csv(tmp_path / "job" / "Train_Samples_loss_scale.csv") == {2: 16.0, 4: 16.0}


@on_ranks(2)
def test_a_plain_backward_writes_no_loss_and_a_broken_monitor_ends_nothing(tmp_path):
    engine = engine_of(tiny(), config(1, wall_clock_breakdown=True, **csv_section(tmp_path)))
    engine(batch(0)).backward()
    engine.step()
    dist.barrier()
    seen = ("elapsed_time_ms_forward", "elapsed_time_ms_step", "lr")
    assert sorted(path.name for path in (tmp_path / "job").iterdir()) == [f"Train_Samples_{name}.csv" for name in seen]
    engine = engine_of(tiny(), config(1, **csv_section(tmp_path)))
    if engine.monitor.csv_monitor is not None:
        engine.monitor.csv_monitor.write_events = lambda events: 1 / 0
    with Ear() as said:
        train(engine, 3)
    assert engine.global_steps == 3 and len(said) == (dist.get_rank() == 0)


@on_ranks(2)
def test_progress_and_times_are_said_on_rank_0():
    engine = engine_of(tiny(), config(2, gradient_accumulation_steps=2, steps_per_print=2, wall_clock_breakdown=True))
    with Ear() as said:
        train(engine, 12)
    if dist.get_rank() != 0:
        assert said == []
        return
    progress = [line for line in said if line.startswith("step=")]
    assert [line.split(",")[0] for line in progress] == ["step=2", "step=4", "step=6"]
    assert "skipped=0, lr=[0.01], mom=[(0.9, 0.999)], grad_norm=" in progress[0] and "samples/sec=" in progress[1]
    assert "loss_scale" not in progress[0]
    times = [line for line in said if line.startswith("[Rank 0] time (ms)")]
    assert len(times) == 12 + 6
    assert [part.split(":")[0] for part in times[2].split(" | ")[1:]] == ["fwd", "bwd", "bwd_inner", "bwd_allreduce", "step"]
    assert [part.split(":")[0] for part in times[0].split(" | ")[1:]] == [f"{name}_microstep" for name in (
        "fwd", "bwd", "bwd_inner", "bwd_allreduce", "step")]


@on_ranks(1)
def test_infinite_steps_per_print_is_never():
    engine = engine_of(tiny(), config(0, steps_per_print=float("inf")))
    with Ear() as said:
        train(engine, 2)
    assert said == [] and not engine._reporting


@on_ranks(1)
def test_a_step_that_failed_does_not_spoil_the_timers():
    engine = engine_of(tiny(), config(0, wall_clock_breakdown=True))
    with pytest.raises(RuntimeError):
        engine(torch.zeros(2, 5))
    train(engine, 1)
    assert engine.timers.has_timer("fwd") and not engine.timers("fwd").started_


def _steps_with_switches(more):
    """(what was said, the calls of device synchronisation and of the garbage collector in three steps)."""
    import gc
    engine = engine_of(tiny(), config(1, **more))
    train(engine, 1)
    accelerator, calls = get_accelerator(), []
    kept = accelerator.synchronize, gc.collect
    accelerator.synchronize = lambda *_: calls.append("synchronize")
    gc.collect = lambda *_: calls.append("collect") or 0
    try:
        with Ear() as said:
            train(engine, 3)
    finally:
        accelerator.synchronize, gc.collect = kept
    return said, calls, isinstance(engine.timers, NoopTimer), engine._watching, engine._reporting


def test_silence_waits_for_nothing():
    for said, calls, noop, watching, reporting in run(_steps_with_switches, 2, {}):
        assert (said, calls, noop, watching, reporting) == ([], [], True, False, False)


def _memory_lines():
    engine = engine_of(tiny(), config(1, memory_breakdown=True))
    with redirect_stdout(io.StringIO()) as out:
        train(engine, 3)
    return [line for line in out.getvalue().splitlines() if line.startswith(("before ", "after "))]


def test_memory_breakdown_looks_around_every_phase_and_collects_no_garbage(capfd):
    first, second = run(_memory_lines, 2)
    assert first == 3 * [f"{when} {phase}" for phase in ("forward", "backward", "step") for when in ("before", "after")] and second == []
    for _, calls, *_ in run(_steps_with_switches, 2, {"memory_breakdown": True}):
        assert calls == []


@on_ranks(1)
def test_dump_state_and_log_level():
    with Ear() as said:
        engine = engine_of(tiny(), config(0, dump_state=True, log_level="error"))
    assert engine.log_level() == "error" and logger.level == logging.ERROR
    logger.setLevel(logging.WARNING)
    with Ear() as said:
        engine_of(tiny(), config(0, dump_state=True))
        engine.print_forward_breakdown(12.345)
    assert "  global_steps = 0" in said[0].splitlines() and "forward: 12.35" in said[1]


# ---- the flops profile


class Slow(torch.utils.data.Dataset):
    """Four micro-batches; each sample takes three seconds of `now`."""

    def __init__(self, now):
        self.now = now

    def __len__(self):
        return 4 * len(batch(0))

    def __getitem__(self, index):
        self.now[0] += 3.0
        return batch(index)[0]


class Chain(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(9, 30), nn.Linear(30, 1)

    def forward(self, x):
        return self.second(torch.relu(self.first(x))).square().mean()


def _profile(stage, folder):
    out = Path(folder) / "flops.txt"
    section = {"enabled": True, "profile_step": 1, "output_file": str(out)}
    engine = engine_of(Chain(), config(stage, gradient_accumulation_steps=2, flops_profiler=section))
    train(engine, 2)
    before = out.exists()
    train(engine, 4)
    assert engine.flops_profiler_enabled() and engine.wall_clock_breakdown() and engine.flops_profiler_profile_step() == 1
    assert not engine.flops_profiler.started and not engine.flops_profiler.done
    return before, out.read_text() if dist.get_rank() == 0 else ""


@pytest.mark.parametrize("stage", [0, 3])
def test_profile_of_one_update(stage, tmp_path):
    before, text = run(_profile, 2, stage, tmp_path)[0]
    lines = {line.split(":")[0]: line.rpartition("  ")[2].strip() for line in text.splitlines() if ":" in line}
    macs = 2 * 9 * 30 + 2 * 30
    assert not before and lines["fwd MACs per GPU"] == "600 MACs" and macs == 600
    assert lines["fwd flops per GPU"] == "1.26 K"  # 1200, relu on 60, the square on 2, their mean 2
    assert lines["params per GPU"] == "331" and lines["world size"] == "2" and lines["micro-batches per update"] == "2"
    first, = (line for line in text.splitlines() if line.startswith("  (first) Linear"))
    assert "  300  " in first and "540 MACs" in first  # a sharded parameter counts whole
    assert lines["step latency"].endswith("s") and float(lines["samples/second, all ranks"]) > 0


@on_ranks(1)
@pytest.mark.parametrize("begun", [False, True])
def test_a_forward_that_failed_does_not_spoil_the_profile(tmp_path, begun):
    out = tmp_path / "flops.txt"
    engine = engine_of(Chain(), config(0, flops_profiler={"enabled": True, "profile_step": 1, "output_file": str(out)}))
    train(engine, 1)
    if begun:
        engine.flops_profiler.start_profile()  # the caller's own, not ended
    with pytest.raises(RuntimeError):
        engine(torch.zeros(2, 5))
    assert not engine.flops_profiler.started and torch.backends.mha.get_fastpath_enabled()
    train(engine, 2)
    text = out.read_text()
    assert "600 MACs" in text and engine.global_steps == 3


@on_ranks(1)
@pytest.mark.parametrize("name", ["file/flops.txt", "", "nul\0"])
def test_a_profile_that_cannot_be_written_is_printed(tmp_path, name):
    (tmp_path / "file").write_text("")
    section = {"enabled": True, "profile_step": 1, "output_file": str(tmp_path / name)}
    engine = engine_of(Chain(), config(0, flops_profiler=section))
    with Ear() as said, redirect_stdout(io.StringIO()) as out:
        train(engine, 3)
    assert engine.global_steps == 3 and "fwd MACs per GPU" in out.getvalue()
    assert len([line for line in said if line.startswith("flops_profiler.output_file: ")]) == 1


@on_ranks(1)
def test_samples_per_second_count_the_loading_of_data():
    engine = engine_of(tiny(), config(0))
    timer, now = engine.tput_timer, [0.0]
    timer._mark, timer._by_event = lambda: now[0], False
    loader = engine.deepspeed_io(Slow(now))
    for _ in range(2):
        for x in loader:
            engine.backward(engine(x))
            engine.step()
        now[0] += 1000.0  # an evaluation between the epochs
    assert timer.total_elapsed_time == pytest.approx((2 * 4 - 2) * 3.0 * len(x)) and timer.global_step_count == 8
    next(iter(loader))
    now[0] += 1000.0  # a pass that was left, and so was the batch it had fetched
    next(iter(loader))
    assert timer.started and timer._began == pytest.approx(now[0] - 3.0 * len(x))
