# SPDX-License-Identifier: Apache-2.0
"""The `timeline` option: what a few steps did when, on every rank, for deepspeed.telemetry.trace and deepspeed.telemetry.draw.

Note [What it costs]: nothing when off. When on, and during the traced steps only, device events at the borders of phases and
units, one line of the C++ ledger for each collective, and a look at the memory at the borders (PSS, which the kernel adds up page
by page, only at those of phases). On CUDA collectives are shown where the host issues them.

Note [Whose times]: spans of phases and units are measured with the accelerator's events from one anchor a step, so that nothing
waits for the device before the trace is written; collectives with the host's clock.
"""
import atexit
import os
import socket
import time
import weakref

import torch
import torch.distributed as dist

from deepspeed.comm import flight
from deepspeed.device import get_accelerator
from deepspeed.telemetry.memory import process_memory
from deepspeed.telemetry.trace import Span, chrome_trace, clock_offset_s, write_json
from deepspeed.zero.tensors import tensors_in

MOST_COLLECTIVES = 100_000  # of one group
_ROUNDS = 9


class Timeline:

    def __init__(self, engine, section):
        self.folder, self.first, self.last = section.folder, section.first_step, section.first_step + section.steps - 1
        self.rank, self.device = engine.global_rank, engine.device
        self._engine = weakref.ref(engine)
        self._spans, self._open, self._samples, self._handles = [], {}, [], []
        self._anchor = None
        self.active = self._done = False
        self.base_s, self.offset_s, self.host = _agree_on_time(self.rank)
        os.makedirs(self.folder, exist_ok=True)
        self._at_exit = atexit.register(self.finish)

    # ---- phases, told by the engine

    def phase_begins(self, name):
        step = self._engine().global_steps
        if not self.active and not self._done and self.first <= step <= self.last:
            self._begin_tracing()
        if self.active:
            if name == "forward" or self._anchor is None:
                self._set_anchor()
            self.begin("step", name)
            self.sample(name, thorough=True)

    def phase_ends(self, name):
        if not self.active:
            return
        if name == "backward":
            self.end("units backward")
        self.sample(name, thorough=True)
        self.end("step")
        if name == "step" and self._engine().global_steps > self.last:
            self.finish()

    # ---- spans: at most one open on each track

    def _set_anchor(self):
        event = get_accelerator().Event(enable_timing=True)
        event.record()
        event.synchronize()
        self._anchor = (time.time(), event)

    def _now(self):
        event = get_accelerator().Event(enable_timing=True)
        event.record()
        return self._anchor, event

    def begin(self, track, name, **args):
        self.end(track)
        self._open[track] = (name, self._now(), dict(args, step=self._engine().global_steps))

    def end(self, track):
        if track in self._open:
            name, began, args = self._open.pop(track)
            self._spans.append((track, name, began, self._now(), args))

    def sample(self, what, thorough=False):
        self._samples.append(dict(process_memory(thorough), t_s=time.time() - self.offset_s - self.base_s, what=what,
                                  step=self._engine().global_steps))

    # ---- tracing

    def _begin_tracing(self):
        self.active = True
        flight.keep_trace(MOST_COLLECTIVES)
        engine = self._engine()
        if engine._managed is not None:
            for unit in engine._managed.module_hooks.plan.units:
                self._watch_unit(unit.name or "root", unit.scope)

    def _watch_unit(self, name, module):
        """Backward is seen at graph nodes: modules' backward hooks would put nodes of their own into the graph."""

        def before(module, args):
            if self.active:
                self.begin("units forward", name)

        def after(module, args, kwargs, output):
            if not self.active:
                return
            self.end("units forward")
            self.sample(name)
            if torch.is_grad_enabled():
                for node in _nodes(tensors_in(args) + tensors_in(kwargs)):
                    node.register_prehook(leaves)
                for node in _nodes(tensors_in(output)):
                    node.register_prehook(enters)

        def enters(grads):
            if self.active:
                self.begin("units backward", name)
                self.sample(name)

        def leaves(grads):
            if self.active and self._open.get("units backward", ("",))[0] == name:
                self.end("units backward")
                self.sample(name)

        self._handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after, with_kwargs=True)]

    def finish(self):
        """Writes the files; once, also when training ends before the last step that was to be traced."""
        atexit.unregister(self.finish)
        if self._done or not self.active:
            self._done = True
            return
        for track in list(self._open):
            self.end(track)
        self.active, self._done = False, True
        for handle in self._handles:
            handle.remove()
        collectives = [record for _, ledger in flight.ledgers() for record in ledger.take_trace()]
        flight.keep_trace(0)
        spans = self._settled() + _collective_spans(collectives, self._step_of)
        trace = chrome_trace(spans, self.rank, self.host, self.base_s, self.offset_s, device=self.device.type)
        write_json(os.path.join(self.folder, f"trace_rank{self.rank}.json"), trace)
        write_json(os.path.join(self.folder, f"memory_rank{self.rank}.json"),
                   {"rank": self.rank, "host": self.host, "device": self.device.type, "samples": self._samples})
        self._handles, self._spans, self._samples = [], [], []

    def _settled(self):
        get_accelerator().synchronize()
        self._phases = []
        spans = [Span(track, name, _host_time_s(*began), _host_time_s(*ended), args) for track, name, began, ended, args in self._spans]
        self._phases = [(span.begin_s, span.end_s, span.args["step"]) for span in spans if span.track == "step"]
        return spans

    def _step_of(self, at_s):
        """The step during which something happened: collectives are numbered by the optimizer's steps, which lag in forward."""
        return next((step for begin_s, end_s, step in reversed(self._phases) if begin_s <= at_s), -1)


def _host_time_s(anchor, event):
    at_s, origin = anchor
    return at_s + origin.elapsed_time(event) / 1e3


def _nodes(tensors):
    return {t.grad_fn for t in tensors if t.grad_fn is not None}


def _collective_spans(records, step_of):
    spans = []
    for r in records:
        track = "gathers" if r["kind"].startswith("all_gather") and r["kind"] != "all_gather_host" else \
            "reductions" if r["kind"].startswith("reduce") else "other collectives"
        args = {"kind": r["kind"], "bytes": r["bytes"], "unit": r["unit"], "number": r["seq"], "blocked_ms": round(r["waited_s"] * 1e3, 3),
                "step": step_of(r["start_s"])}
        name = r["phase"] or r["kind"]
        spans.append(Span(track, name, r["start_s"], r["end_s"], args))
        if r["waited_s"] > 0:  # the wait is what came last
            spans.append(Span("blocked", name, max(r["start_s"], r["end_s"] - r["waited_s"]), r["end_s"], args))
    return spans


def _agree_on_time(rank):
    """(time 0 on rank 0's clock, how far this rank's clock is ahead of rank 0's, host name). Collective. One host has one clock."""
    with open("/proc/sys/kernel/random/boot_id") as file:
        me = (time.time(), file.read().strip())
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, me)
    offset_s = 0.0
    if len({boot for _, boot in everyone}) > 1:
        samples = []
        for _ in range(_ROUNDS):
            dist.barrier()
            now_s, instant = time.time(), [None] * dist.get_world_size()
            dist.all_gather_object(instant, now_s)
            samples.append(instant)
        offset_s = clock_offset_s(samples, rank)
    return everyone[0][0], offset_s, socket.gethostname()

