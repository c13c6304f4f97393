# SPDX-License-Identifier: Apache-2.0
"""Timers of the training step.

Note [Timing without waiting]: a started timer records a device event and a stopped one another; the host waits only when
somebody asks for the figure. On the CPU an event is the wall clock. All figures are milliseconds, except samples/s.
"""
import logging
import time

from deepspeed.device.select import get_accelerator
from deepspeed.telemetry.logs import current_rank, logger, report

FORWARD_MICRO_TIMER = "fwd_microstep"
FORWARD_GLOBAL_TIMER = "fwd"
BACKWARD_MICRO_TIMER = "bwd_microstep"
BACKWARD_GLOBAL_TIMER = "bwd"
BACKWARD_INNER_MICRO_TIMER = "bwd_inner_microstep"
BACKWARD_INNER_GLOBAL_TIMER = "bwd_inner"
BACKWARD_REDUCE_MICRO_TIMER = "bwd_allreduce_microstep"
BACKWARD_REDUCE_GLOBAL_TIMER = "bwd_allreduce"
STEP_MICRO_TIMER = "step_microstep"
STEP_GLOBAL_TIMER = "step"

_GB = 1024.0**3


class Timer:
    """One named stopwatch: the sum of its intervals since the last reset, and every recorded interval for the mean."""

    def __init__(self, name):
        self.name_ = name
        self.started_ = False
        self._begin = None
        self._pending = []  # (start event, end event, record?) of intervals nobody has read yet
        self._total_ms = 0.0
        self._recorded_ms = []

    def start(self):
        if self.started_:
            raise RuntimeError(f"timer {self.name_!r} is running already")
        self._begin = get_accelerator().Event(enable_timing=True)
        self._begin.record()
        self.started_ = True

    def stop(self, reset=False, record=False):
        """Ends the interval. `reset` forgets earlier ones; `record` keeps this one for `mean`."""
        if not self.started_:
            raise RuntimeError(f"timer {self.name_!r} is not running")
        end = get_accelerator().Event(enable_timing=True)
        end.record()
        if reset:
            self._pending, self._total_ms = [], 0.0
        self._pending.append((self._begin, end, record))
        self.started_ = False

    def _settle(self):
        for begin, end, record in self._pending:
            end.synchronize()
            interval_ms = begin.elapsed_time(end)
            self._total_ms += interval_ms
            if record:
                self._recorded_ms.append(interval_ms)
        self._pending = []

    def reset(self):
        self.started_ = False
        self._pending, self._total_ms, self._recorded_ms = [], 0.0, []

    def elapsed(self, reset=True):
        """Milliseconds since the last reset; a running timer is read and goes on."""
        running = self.started_
        if running:
            self.stop()
        self._settle()
        total_ms = self._total_ms
        if reset:
            self._total_ms = 0.0
        if running:
            self.start()
        return total_ms

    def mean(self):
        """Mean of the recorded intervals in milliseconds, without the slowest and fastest tenth."""
        self._settle()
        return trim_mean(self._recorded_ms, 0.1)


class SynchronizedWallClockTimer:
    """Timers by name: `timers("fwd").start()`."""

    Timer = Timer

    def __init__(self):
        self.timers = {}

    def get_timers(self):
        return self.timers

    def has_timer(self, name):
        return name in self.timers

    def __call__(self, name):
        if name not in self.timers:
            self.timers[name] = Timer(name)
        return self.timers[name]

    @staticmethod
    def memory_usage():
        """One line with the accelerator's memory, in GB."""
        device = get_accelerator()
        return (f"mem_allocated: {device.memory_allocated() / _GB:.4f} GB | max_mem_allocated: "
                f"{device.max_memory_allocated() / _GB:.4f} GB | mem_reserved: {device.memory_reserved() / _GB:.4f} GB | "
                f"max_mem_reserved: {device.max_memory_reserved() / _GB:.4f} GB")

    def log(self, names, normalizer=1.0, reset=True, memory_breakdown=False, ranks=None):
        """Reports the named timers, each divided by `normalizer`, on rank 0 or `ranks`. They are read, and reset, on every rank."""
        if normalizer <= 0:
            raise ValueError(f"normalizer must be positive, got {normalizer}")
        figures = [f"{name}: {self.timers[name].elapsed(reset=reset) / normalizer:.2f}" for name in names if name in self.timers]
        text = f"[Rank {current_rank() or 0}] time (ms) | " + " | ".join(figures)
        if memory_breakdown:
            text += " | " + self.memory_usage()
        report(text, ranks=ranks or [0])

    def get_mean(self, names, normalizer=1.0, reset=True):
        """{name: mean of its recorded intervals / normalizer, ms}."""
        if normalizer <= 0:
            raise ValueError(f"normalizer must be positive, got {normalizer}")
        means = {}
        for name in names:
            if name in self.timers:
                means[name] = self.timers[name].mean() / normalizer
                if reset:
                    self.timers[name].reset()
        return means


class NoopTimer:
    """Stands in for SynchronizedWallClockTimer when nobody wants figures."""

    class Timer:
        def start(self): ...

        def reset(self): ...

        def stop(self, **kwargs): ...

        def elapsed(self, **kwargs):
            return 0.0

        def mean(self):
            return 0.0

    def __init__(self):
        self.timer = self.Timer()

    def __call__(self, name):
        return self.timer

    def get_timers(self):
        return {}

    def has_timer(self, name):
        return True

    def log(self, names, normalizer=1.0, reset=True, memory_breakdown=False, ranks=None): ...

    def get_mean(self, names, normalizer=1.0, reset=True):
        return {}


class ThroughputTimer:
    """Samples per second of the training loop, the loading of its data included; the first `start_step` steps do not count.

    config: has the attributes `enabled`, and `synchronized`: measure the device's time, not the host's. Either way the host never
    waits for the device before somebody asks for a figure.
    logging_fn: takes the line said every `steps_per_output` steps; default: the logger, at level INFO.
    """

    def __init__(self, config, batch_size, start_step=2, steps_per_output=None, monitor_memory=False, logging_fn=None):
        self.config = config
        self.batch_size = batch_size or 1
        self.start_step = start_step
        self.steps_per_output = steps_per_output
        self.monitor_memory = monitor_memory
        self.logging = logging_fn
        self.epoch_count = 0
        self.micro_step_count = 0
        self.global_step_count = 0
        self.started = False
        self._enabled = bool(config.enabled)
        self._by_event = self._enabled and bool(config.synchronized) and not get_accelerator().is_synchronized_device()
        self._began = None  # what _mark() gave; None: a step that does not count
        self._pending = []  # intervals on the device that have not been read, as (begin, end, ends a step)
        self._total_s = self._step_s = self._last_step_s = 0.0

    def update_epoch_count(self):
        self.epoch_count += 1
        self.micro_step_count = 0

    def _mark(self):
        if not self._by_event:
            return time.perf_counter()
        event = get_accelerator().Event(enable_timing=True)
        event.record()
        return event

    def start(self):
        """Begins a micro-step. Whoever comes first counts: the data loader fetching the batch, or else the forward."""
        if self._enabled and not self.started:
            self.started = True
            self._began = self._mark() if self.global_step_count >= self.start_step else None

    def stop(self, global_step=False, report_speed=True):
        """Ends a micro-step; `global_step` says that the optimizer stepped."""
        if not self.started:
            return
        self.started = False
        self.micro_step_count += 1
        if global_step:
            self.global_step_count += 1
        if self._began is None:
            return
        end = self._mark()
        if self._by_event:
            self._pending.append((self._began, end, global_step))
            if len(self._pending) >= 1024:
                self._settle()
        else:
            self._add(end - self._began, global_step)
        if global_step and report_speed and self.steps_per_output and self.global_step_count % self.steps_per_output == 0:
            self._report()

    def _add(self, seconds, ends_step):
        self._total_s += seconds
        self._step_s += seconds
        if ends_step:
            self._last_step_s, self._step_s = self._step_s, 0.0

    def _settle(self):
        for begin, end, ends_step in self._pending:
            end.synchronize()
            self._add(begin.elapsed_time(end) / 1000.0, ends_step)
        self._pending = []

    def _report(self):
        if self.logging is None and not logger.isEnabledFor(logging.INFO):
            return
        text = (f"epoch={self.epoch_count}/micro_step={self.micro_step_count}/global_step={self.global_step_count}, "
                f"RunningAvgSamplesPerSec={self.avg_samples_per_sec():.4f}, "
                f"CurrSamplesPerSec={self.batch_size / max(self._last_step_s, 1e-9):.4f}")
        if self.monitor_memory:
            text += ", " + SynchronizedWallClockTimer.memory_usage()
        (self.logging or logger.info)(text)

    @property
    def total_elapsed_time(self):
        """Seconds of all steps that count."""
        self._settle()
        return self._total_s

    def avg_samples_per_sec(self):
        """Over all steps that count; negative infinity before the first."""
        counted = self.global_step_count - self.start_step
        elapsed_s = self.total_elapsed_time
        if counted <= 0 or elapsed_s <= 0.0:
            return float("-inf")
        return self.batch_size / (elapsed_s / counted)


def trim_mean(data, trim_percent):
    """Mean without the smallest and the largest `trim_percent` (a fraction in [0, 1)) of the values; 0 for none."""
    if not 0.0 <= trim_percent < 1.0:
        raise ValueError(f"trim_percent must be in [0, 1), got {trim_percent}")
    ordered = sorted(data)
    cut = int(len(ordered) * trim_percent)
    kept = ordered[cut:len(ordered) - cut] or ordered
    return sum(kept) / len(kept) if kept else 0.0
