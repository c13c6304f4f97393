# SPDX-License-Identifier: Apache-2.0
"""What the engine says while it trains: progress lines, times and memory of the phases, events for monitors, the flops profile.

Note [Silence is free]: `_open_telemetry` decides once what is wanted. `_watching` is false when no phase of a step needs attention and
`_reporting` when nothing is said after one; the step asks these two and does nothing else.
"""
import math

from deepspeed.telemetry import logs, timers
from deepspeed.telemetry.memory import print_memory
from deepspeed.telemetry.monitors import MonitorMaster
from deepspeed.zero.accounting import places_table
from deepspeed.zero.tiers import IN_MEMORY

# phase -> its timer of one micro-batch, and of one update
PHASES = {
    "forward": (timers.FORWARD_MICRO_TIMER, timers.FORWARD_GLOBAL_TIMER),
    "backward": (timers.BACKWARD_MICRO_TIMER, timers.BACKWARD_GLOBAL_TIMER),
    "backward_inner": (timers.BACKWARD_INNER_MICRO_TIMER, timers.BACKWARD_INNER_GLOBAL_TIMER),
    "backward_allreduce": (timers.BACKWARD_REDUCE_MICRO_TIMER, timers.BACKWARD_REDUCE_GLOBAL_TIMER),
    "step": (timers.STEP_MICRO_TIMER, timers.STEP_GLOBAL_TIMER),
}
_MICRO, _GLOBAL = zip(*PHASES.values())
_WHOLE_PHASES = ("forward", "backward", "step")  # the others are parts of backward


class Reporting:
    """The engine's part that looks on."""

    def _open_telemetry(self):
        cfg = self._config
        if cfg.log_level:
            logs.set_log_level_from_string(cfg.log_level)
        every = cfg.steps_per_print
        self._print_every = int(every) if every and not math.isinf(every) else 0
        self._timed = self.wall_clock_breakdown()
        self._memory = cfg.memory_breakdown
        self.monitor = MonitorMaster(cfg)
        self._keep_loss = self.monitor.enabled and self.global_rank == 0
        self._loss_sum = None  # of the micro-batches since the last update, each divided by their number
        self.timers = timers.SynchronizedWallClockTimer() if self._timed else timers.NoopTimer()
        self.tput_timer = timers.ThroughputTimer(cfg.timers.throughput, cfg.train_batch_size, steps_per_output=self._print_every)
        self.flops_profiler = None
        self._timeline = None  # made when the engine is complete
        self._watching = self._timed or self._memory or cfg.timeline.enabled
        self._reporting = self._watching or self._keep_loss or (self._print_every > 0 and self.global_rank == 0)

    def _say_state(self):
        """Once, when the engine is complete."""
        if self._config.flops_profiler.enabled:
            from deepspeed.telemetry.flops import FlopsProfiler
            self.flops_profiler = FlopsProfiler(self.module, self, self._config.flops_profiler.recompute_fwd_factor)
        if self._config.timeline.enabled:
            from deepspeed.engine.timeline import Timeline
            self._timeline = Timeline(self, self._config.timeline)
        if self._memory:
            print_memory("after initialize")
        if self._managed is not None and self._managed.tiers != IN_MEMORY and self._managed.optimizer is not None:
            lines = "\n".join(places_table(self._managed.optimizer))
            logs.report(f"where the state of training rests, on each rank:\n{lines}")
        if self._config.dump_state:
            lines = [f"  {name} = {value}" for name, value in self.dump_state().items()]
            logs.report("\n".join([f"{type(self).__name__} after initialize:", *lines]))

    # ---- around the phases; called only while `_watching`

    def _begin(self, phase):
        if self._timeline is not None and phase in _WHOLE_PHASES:
            self._timeline.phase_begins(phase)
        if self._memory and phase in _WHOLE_PHASES:
            print_memory(f"before {phase}")
        if self._profiles_now(phase):
            self.flops_profiler.stop_profile()  # one that the caller has begun
            self.flops_profiler.start_profile()
        if self._timed:
            for name in PHASES[phase]:
                timer = self.timers(name)
                timer.started_ = False  # an exception, since caught by the caller, may have left it running
                timer.start()

    def _end(self, phase):
        if self._timed:
            for name in PHASES[phase]:
                self.timers(name).stop()
        if self._profiles_now(phase):
            self.flops_profiler.stop_profile()
        if self._memory and phase in _WHOLE_PHASES:
            print_memory(f"after {phase}")
        if self._timeline is not None and phase in _WHOLE_PHASES:
            self._timeline.phase_ends(phase)

    def _break_off(self, phase):
        """The phase raised; the caller may catch it and go on. The profile is taken of the next micro-batch instead."""
        if self._profiles_now(phase):
            self.flops_profiler.end_profile()

    def _profiles_now(self, phase):
        """The first micro-batch of the update that is to be profiled, on rank 0."""
        return (phase == "forward" and self.flops_profiler is not None and self.global_rank == 0
                and self.global_steps == self._config.flops_profiler.profile_step and not self.flops_profiler.done)

    # ---- after a step; called only while `_reporting`

    def _report(self, boundary):
        if self._timed:
            self._report_times(boundary)
        if not boundary or self.global_rank != 0:
            return
        if self._print_every and self.global_steps % self._print_every == 0:
            logs.report(self._progress_line())
        if self._keep_loss:
            self.monitor.write_events(self._events())
            self._loss_sum = None

    def _report_times(self, boundary):
        """Reads the timers on every rank, that none of them piles up intervals; speaks on rank 0."""
        memory = self._memory
        self.timers.log(_MICRO, memory_breakdown=memory)
        if not boundary:
            return
        self._update_ms = {phase: self.timers(name).elapsed(reset=False) for phase, (_, name) in PHASES.items()
                           if self.timers.has_timer(name)}
        section = self._config.flops_profiler
        if self.flops_profiler is not None and self.flops_profiler.done and self.global_steps == section.profile_step + 1:
            self.flops_profiler.print_model_profile(profile_step=section.profile_step, module_depth=section.module_depth,
                                                    top_modules=section.top_modules, detailed=section.detailed,
                                                    output_file=section.output_file)
            self.flops_profiler.end_profile()
        self.timers.log(_GLOBAL, memory_breakdown=memory)

    def _progress_line(self):
        parts = [f"step={self.global_steps}", f"skipped={self.skipped_steps}", f"lr={self.get_lr()}", f"mom={self.get_mom()}"]
        if self._config.fp16.enabled:
            parts.append(f"loss_scale={self.loss_scale():g}")
        if self._global_grad_norm is not None:
            parts.append(f"grad_norm={float(self._global_grad_norm):.4g}")
        speed = self.tput_timer.avg_samples_per_sec()
        if speed > 0:
            parts.append(f"samples/sec={speed:.4g}")
        return ", ".join(parts)

    def _events(self):
        """What the monitors get after an update; the step is the number of samples seen."""
        at = self.global_samples
        events = []
        if self._loss_sum is not None:
            events.append(("Train/Samples/train_loss", float(self._loss_sum), at))
        rates = self.get_lr()
        if rates:
            events.append(("Train/Samples/lr", float(rates[0]), at))
        if self._config.fp16.enabled:
            events.append(("Train/Samples/loss_scale", float(self.loss_scale()), at))
        if self._timed:
            events += [(f"Train/Samples/elapsed_time_ms_{phase}", ms, at) for phase, ms in self._update_ms.items()]
        return events

    # ---- what callers ask

    def wall_clock_breakdown(self):
        """wall_clock_breakdown of the configuration; the flops profiler, which reports the same times, switches it on."""
        return self._config.wall_clock_breakdown or self._config.flops_profiler.enabled

    def get_wall_clock_timers(self):
        return self.timers

    def print_forward_breakdown(self, fwd_time):
        """Reports the time of a forward pass, in milliseconds, on this rank."""
        logs.report(f"rank={self.global_rank} time (ms) | forward: {fwd_time:.2f}", ranks=[self.global_rank])

    def dump_state(self):
        """{attribute: its value as text, shortened}."""
        return {name: str(value)[:200] for name, value in sorted(self.__dict__.items()) if not name.startswith("_")}

    def _profiler_key(name):  # noqa: N805
        def read(self):
            return getattr(self._config.flops_profiler, name)
        read.__doc__ = f"flops_profiler.{name}"
        return read

    flops_profiler_enabled = _profiler_key("enabled")
    flops_profiler_recompute_fwd_factor = _profiler_key("recompute_fwd_factor")
    flops_profiler_profile_step = _profiler_key("profile_step")
    flops_profiler_module_depth = _profiler_key("module_depth")
    flops_profiler_top_modules = _profiler_key("top_modules")
    flops_profiler_detailed = _profiler_key("detailed")
    flops_profiler_output_file = _profiler_key("output_file")
    del _profiler_key
