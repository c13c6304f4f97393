# SPDX-License-Identifier: Apache-2.0
"""Measures a forward pass by module."""
import functools
import time
from contextlib import ExitStack

import torch

from deepspeed.device.select import get_accelerator
from deepspeed.telemetry.flops import report
from deepspeed.telemetry.flops.counter import OperationCounter, in_backward
from deepspeed.telemetry.flops.units import duration_to_string, macs_to_string, number_to_string, params_to_string


class Record:
    """What ran inside one module, its submodules included, in all its calls. latency_s leaves out the work of counting."""

    __slots__ = ("macs", "flops", "latency_s", "calls", "active")

    def __init__(self):
        self.macs = self.flops = self.calls = self.active = 0
        self.latency_s = 0.0


def numel_of(parameters):
    """Logical sizes: a sharded parameter counts whole, one that appears twice counts once."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in {id(p): p for p in parameters}.values())


class FlopsProfiler:
    """Operations (see Note [What is counted]), parameters and latency of a model's forward pass, by module.

        profiler = FlopsProfiler(model)
        profiler.start_profile()
        model(batch)
        profiler.stop_profile()
        print(profiler.get_total_macs(as_string=True))
        profiler.print_model_profile()
        profiler.end_profile()

    model: works as it is, sharded by ZeRO-3 or not; sizes are logical ones. What a backward pass runs is not counted.
    ds_engine: adds the latencies of backward and step, and the sizes of the groups, to the report.
    recompute_fwd_factor: share of the forward pass that activation checkpointing repeats in backward, for backward's FLOPS.
    Operations inside a graph made by torch.compile are not seen: profile before compiling.
    """

    def __init__(self, model, ds_engine=None, recompute_fwd_factor=0.0):
        self.model = model
        self.ds_engine = ds_engine
        self.recompute_fwd_factor = recompute_fwd_factor
        self.started = False
        self.done = False  # a finished measurement is held
        self.uncounted = {}
        self._records = {}
        self._active = []
        self._ignored_depth = 0
        self._running = None

    # ---- measuring

    def start_profile(self, ignore_list=None):
        """Begins anew. ignore_list: modules, or classes of modules, in which nothing is counted."""
        if self.started:
            raise RuntimeError("start_profile: the profile is running already; call stop_profile first")
        self.reset_profile()
        ignored = tuple(ignore_list or ())
        classes = tuple(entry for entry in ignored if isinstance(entry, type))
        with ExitStack() as stack:
            for module in self.model.modules():
                skip = isinstance(module, classes) or any(entry is module for entry in ignored)
                self._watch(module, skip, stack)
            stack.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
            torch.backends.mha.set_fastpath_enabled(False)  # its fused kernels would hide the operations
            self._counter = stack.enter_context(OperationCounter(self._count))
            torch.ones(1) + 1  # the first operation seen loads parts of PyTorch, seconds that would be booked on the first module
            self._running = stack.pop_all()
        self.started = True

    def _watch(self, module, skip, stack):
        record = self._records[module] = Record()
        began = []

        def enter(_, __):
            if in_backward():
                return
            record.calls += 1
            record.active += 1
            self._ignored_depth += skip
            if record.active == 1:
                self._active.append(record)
            began.append(self._clock())

        def leave(*_):
            if in_backward() or not began:
                return
            took = self._clock() - began.pop()
            self._ignored_depth -= skip
            record.active -= 1
            if record.active == 0:
                self._active.remove(record)
                record.latency_s += took

        stack.callback(module.register_forward_pre_hook(enter).remove)
        stack.callback(module.register_forward_hook(leave, always_call=True).remove)

    def _clock(self):
        """Seconds, those spent on counting left out; everything queued on the device has happened."""
        get_accelerator().synchronize()
        return time.perf_counter() - self._counter.own_s

    def _count(self, cost):
        if self._ignored_depth:
            return
        for record in self._active:
            record.macs += cost.macs
            record.flops += cost.flops

    def stop_profile(self):
        """Ends the measurement; the figures stay until the next start_profile or end_profile."""
        if self.started:
            self._running.close()
            self.uncounted = dict(self._counter.uncounted)
            self.started, self.done, self._running = False, True, None

    def reset_profile(self):
        """Forgets all figures."""
        self._records, self._active, self._ignored_depth = {}, [], 0
        self.uncounted, self.done = {}, False

    def end_profile(self):
        """Ends the measurement and forgets its figures."""
        self.stop_profile()
        self.reset_profile()

    # ---- figures

    def record_of(self, module):
        """The Record of a module; one of zeros if it was not measured."""
        return self._records.get(module) or Record()

    def get_total_flops(self, as_string=False):
        total = self.record_of(self.model).flops
        return number_to_string(total) if as_string else total

    def get_total_macs(self, as_string=False):
        total = self.record_of(self.model).macs
        return macs_to_string(total) if as_string else total

    def get_total_duration(self, as_string=False):
        """Seconds of the forward pass."""
        total = self.record_of(self.model).latency_s
        return duration_to_string(total) if as_string else total

    def get_total_params(self, as_string=False):
        total = numel_of(self.model.parameters())
        return params_to_string(total) if as_string else total

    # ---- reports

    def print_model_profile(self, profile_step=1, module_depth=-1, top_modules=1, detailed=True, output_file=None):
        """The summary, the largest modules of every depth and, if `detailed`, the tree down to `module_depth` (-1: all of it).

        Goes to standard output, or into `output_file`, whose directories are made.
        """
        text = report.whole(self, profile_step, module_depth, top_modules, detailed)
        report.write(text, output_file)

    def print_model_aggregated_profile(self, module_depth=-1, top_modules=1):
        """The `top_modules` largest kinds of module of every depth, by parameters, MACs and latency."""
        report.write(report.aggregated(self, module_depth, top_modules), None)


def _inputs(input_shape, args, kwargs, model):
    if input_shape is not None:
        if not isinstance(input_shape, tuple) or not input_shape:
            raise ValueError(f"input_shape must be a non-empty tuple, got {input_shape!r}")
        like = next(model.parameters(), torch.empty(0))
        return (torch.ones(input_shape, dtype=like.dtype if like.is_floating_point() else torch.float32, device=like.device),), dict(kwargs)
    if not args and not kwargs:
        raise ValueError("get_model_profile: give input_shape, args or kwargs, so that the model can be called")
    return tuple(args), dict(kwargs)


def get_model_profile(model, input_shape=None, args=[], kwargs={}, print_profile=True, detailed=True, module_depth=-1, top_modules=1,
                      warm_up=1, as_string=True, output_file=None, ignore_modules=None, mode="forward"):
    """(FLOPs, MACs, parameters) of one call of the model, as text or, with `as_string` False, as integers.

    input_shape: of the single float tensor the model takes; or else args, kwargs: what it is called with.
    warm_up: calls before the measured one. mode: "forward" calls the model, "generate" its method generate.
    ignore_modules: modules, or classes of modules, in which nothing is counted. The model is in eval mode meanwhile.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"get_model_profile: model must be a torch.nn.Module, got {type(model).__name__}")
    if mode not in ("forward", "generate"):
        raise ValueError(f"get_model_profile: mode must be 'forward' or 'generate', got {mode!r}")
    args, kwargs = _inputs(input_shape, args, kwargs, model)
    call = functools.partial(model if mode == "forward" else model.generate, *args, **kwargs)
    profiler = FlopsProfiler(model)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        for left in range(warm_up, -1, -1):
            if left <= 1:  # the last warm-up call is watched as well: PyTorch does some work at the first sight of each operation
                profiler.start_profile(ignore_list=ignore_modules)
            try:
                call()
            finally:
                profiler.stop_profile()
    finally:
        for module, mode in modes.items():
            module.training = mode
    if print_profile:
        profiler.print_model_profile(profile_step=warm_up, module_depth=module_depth, top_modules=top_modules, detailed=detailed,
                                     output_file=output_file)
    figures = tuple(total(as_string) for total in (profiler.get_total_flops, profiler.get_total_macs, profiler.get_total_params))
    profiler.end_profile()
    return figures
