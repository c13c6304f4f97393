# SPDX-License-Identifier: Apache-2.0
import types

import pytest

from deepspeed.device.cpu import HostEvent
from deepspeed.telemetry import timers as module
from deepspeed.utils.timer import NoopTimer, SynchronizedWallClockTimer, ThroughputTimer, trim_mean


@pytest.fixture
def clock(monkeypatch):
    """A clock the test moves, in seconds; also the device's."""
    now = types.SimpleNamespace(s=100.0)
    device = types.SimpleNamespace(Event=HostEvent, is_synchronized_device=lambda: False, memory_allocated=lambda: 0,
                                   max_memory_allocated=lambda: 0, memory_reserved=lambda: 0, max_memory_reserved=lambda: 0)
    monkeypatch.setattr("time.perf_counter", lambda: now.s)
    monkeypatch.setattr(module, "get_accelerator", lambda: device)
    return now


def test_elapsed_adds_up_and_resets(clock):
    timers = SynchronizedWallClockTimer()
    for seconds in (1.0, 2.0):
        timers("fwd").start()
        clock.s += seconds
        timers("fwd").stop()
    assert timers("fwd").elapsed(reset=False) == 3000.0 == timers("fwd").elapsed() and timers("fwd").elapsed() == 0.0
    assert timers.has_timer("fwd") and not timers.has_timer("bwd") and list(timers.get_timers()) == ["fwd"]


def test_reading_a_running_timer_goes_on(clock):
    timer = SynchronizedWallClockTimer()("x")
    timer.start()
    clock.s += 1
    assert timer.elapsed() == 1000.0 and timer.started_
    clock.s += 2
    timer.stop()
    assert timer.elapsed() == 2000.0


def test_stop_with_reset_forgets_earlier_ones(clock):
    timer = SynchronizedWallClockTimer()("x")
    for seconds in (5, 1):
        timer.start()
        clock.s += seconds
        timer.stop(reset=True)
    assert timer.elapsed() == 1000.0


def test_mean_of_recorded_intervals(clock):
    timers = SynchronizedWallClockTimer()
    for seconds in (1, 2, 3):
        timers("x").start()
        clock.s += seconds
        timers("x").stop(record=True)
    assert timers.get_mean(["x", "unknown"], normalizer=2.0) == {"x": 1000.0}
    assert timers("x").elapsed() == 0.0
    with pytest.raises(ValueError, match="normalizer"):
        timers.get_mean(["x"], normalizer=0)


def test_misuse(clock):
    timer = SynchronizedWallClockTimer()("x")
    with pytest.raises(RuntimeError, match="'x' is not running"):
        timer.stop()
    timer.start()
    with pytest.raises(RuntimeError, match="'x' is running already"):
        timer.start()


def test_log_line(clock, monkeypatch):
    said = []
    monkeypatch.setattr(module, "report", lambda text, ranks: said.append((text, ranks)))
    timers = SynchronizedWallClockTimer()
    timers("fwd").start()
    clock.s += 0.5
    timers("fwd").stop()
    timers.log(["fwd", "unknown"], normalizer=2, memory_breakdown=True)
    (text, ranks), = said
    assert text.startswith("[Rank 0] time (ms) | fwd: 250.00 | mem_allocated") and ranks == [0]


def test_noop_timer_takes_everything():
    timers = NoopTimer()
    timers("x").start()
    timers("x").stop(record=True)
    timers.log(["x"])
    assert timers("x").elapsed(reset=True) == timers("x").mean() == 0 and timers.get_mean(["x"]) == {} and timers.get_timers() == {}


@pytest.mark.parametrize("synchronized", [True, False])
def test_throughput_leaves_out_the_first_steps(clock, synchronized):
    said = []
    timer = ThroughputTimer(types.SimpleNamespace(enabled=True, synchronized=synchronized), batch_size=10, start_step=2, steps_per_output=2,
                            logging_fn=said.append)
    assert timer.avg_samples_per_sec() == float("-inf")
    timer.update_epoch_count()
    for seconds in (100, 100, 2, 4):
        for micro in range(2):  # two micro-steps a step
            timer.start()
            clock.s += seconds / 2
            timer.stop(global_step=micro == 1)
    assert timer.avg_samples_per_sec() == pytest.approx(10 / 3) and timer.global_step_count == 4 and timer.micro_step_count == 8
    assert timer.epoch_count == 1 and len(said) == 1
    assert "global_step=4" in said[0] and "RunningAvgSamplesPerSec=3.3333, CurrSamplesPerSec=2.5000" in said[0]


def test_throughput_waits_for_the_device_only_when_asked(clock, monkeypatch):
    waits = []
    monkeypatch.setattr(HostEvent, "synchronize", lambda self: waits.append(1))
    timer = ThroughputTimer(types.SimpleNamespace(enabled=True, synchronized=True), batch_size=4, start_step=0, steps_per_output=1)
    for _ in range(5):
        timer.start()
        clock.s += 2
        timer.stop(global_step=True)
    assert not waits and timer.avg_samples_per_sec() == 2.0 and waits


def test_throughput_disabled(clock):
    timer = ThroughputTimer(types.SimpleNamespace(enabled=False, synchronized=True), batch_size=None)
    timer.start()
    timer.stop(global_step=True)
    assert timer.global_step_count == 0 and timer.batch_size == 1


def test_trim_mean():
    assert trim_mean([], 0.1) == 0 and trim_mean([5.0], 0.1) == 5.0
    assert trim_mean([1000.0, *range(1, 9), -1000.0], 0.1) == 4.5
    with pytest.raises(ValueError):
        trim_mean([1.0], 1.0)
