# SPDX-License-Identifier: Apache-2.0
"""Ranks with different numbers of batches.

Inside the context every rank says what comes next before each forward, backward and step. A rank that leaves its loop early stays
in the context's exit and plays what the others say, a backward with zero gradients, until nobody has data. Gradients stay averages
over all ranks, those without data included.

Note [What is followed]: forwards of the engine or its module, engine.backward() and plain backwards, step() with its boundary and
learning rates, no_sync() and coalesce_grad_reduction(). Ranks with data must do these in one order; where they do not, every rank
raises. Other collective calls (gathering parameters, reading gradients, the caller's own) are not followed.
"""
import contextlib
import enum
import struct
from concurrent.futures import ThreadPoolExecutor

import torch

from deepspeed.zero.offload_config import FOR_BACKWARD
from deepspeed.zero.tensors import tensors_in


class Move(enum.IntEnum):
    """What a rank does next."""
    NOTHING = 0     # it has no more data
    FORWARD = 1
    BACKWARD = 2
    DEFERRED_BACKWARD = 3   # gradients wait for a later reduction
    REDUCTION = 4   # of gradients that waited
    STEP = 5


_VERBS = {Move.FORWARD: "a forward", Move.BACKWARD: "a backward", Move.DEFERRED_BACKWARD: "a backward whose reduction is deferred",
          Move.REDUCTION: "the reduction of deferred gradients", Move.STEP: "a step"}


def _describe(move, detail):
    if move is Move.STEP:
        return "a step " + ("at" if detail else "before") + " the boundary of gradient accumulation"
    if move is Move.BACKWARD:
        return f"a backward whose sum over ranks is scaled by {detail:g}"
    return _VERBS[move]


class Join:
    _open = None   # at most one context of a process: a rank without data can follow one engine only

    def __init__(self, engine):
        self._engine = engine
        self._handles = []
        self._inside = False     # an announced engine.backward() is running
        self._graph_task = None  # the last plain backward announced
        self._forwards = 0       # since the last backward, with a graph
        self._holding = False

    def __enter__(self):
        engine = self._engine
        if engine._managed is None or engine._managed.reducer is None:
            raise RuntimeError("join: this engine has no optimizer, there is nothing to keep in step")
        if Join._open is not None:
            raise RuntimeError("join: contexts do not nest, not those of different engines either: a rank without data can follow one only")
        Join._open = engine._joining = self
        # In front of the hooks that gather: what comes next is said before anybody waits for it.
        self._handles = [engine.module.register_forward_pre_hook(self._before_forward, prepend=True),
                         engine.module.register_forward_hook(self._after_forward)]
        return self

    def __exit__(self, kind, error, trace):
        for handle in self._handles:
            handle.remove()
        Join._open = self._engine._joining = None
        if kind is None:
            self._follow()
        return False

    # ---- a rank with data

    def step(self, boundary, lr_kwargs):
        if lr_kwargs:
            raise ValueError("join: step(lr_kwargs=...) cannot be followed by ranks without data; step the scheduler outside the engine")
        self._announce(Move.STEP, boundary)

    def reduction(self):
        self._announce(Move.REDUCTION)

    @contextlib.contextmanager
    def backward(self, post_scale):
        self._announce_backward(post_scale)
        self._inside = True
        try:
            yield
        finally:
            self._inside = False
            self._release_units()

    def _before_forward(self, module, args):
        task = torch._C._current_graph_task_id()
        if not self._inside and (task == -1 or task != self._graph_task):  # recomputation belongs to its backward
            self._announce(Move.FORWARD)

    def _after_forward(self, module, args, output):
        if torch.is_grad_enabled():
            results = [t for t in tensors_in(output) if t.requires_grad]
            self._forwards += bool(results)
            for tensor in results:
                tensor.register_hook(self._at_output)

    def _at_output(self, grad):
        """A backward reaches an output of the model: it is a plain one if nobody has announced it."""
        engine, task = self._engine, torch._C._current_graph_task_id()
        if engine._joining is self and not self._inside and task != self._graph_task:
            self._graph_task = task
            self._announce_backward(engine._layout.post_scale / engine._gas)
            if self._holding:
                torch.autograd.Variable._execution_engine.queue_callback(self._release_units)

    def _announce_backward(self, post_scale):
        self._engine._refuse_without_states("backward", *FOR_BACKWARD)
        deferred = self._engine._managed.reducer.deferred
        self._announce(Move.DEFERRED_BACKWARD if deferred else Move.BACKWARD, 0.0 if deferred else post_scale)
        self._hold_units()

    def _hold_units(self):
        """A backward through several forwards would gather a unit once for each. Where all ranks must gather in one order, those
        without data gather every unit once: so this rank keeps what it has gathered to the end of the backward."""
        managed, several = self._engine._managed, self._forwards > 1
        self._forwards = 0
        self._release_units()   # a plain backward that failed has not
        if several and managed.shards_params and managed.transports.shard.needs_matching_order:
            self._holding = True
            for unit in range(managed.store.units):
                managed.store.pin(unit)

    def _release_units(self):
        if self._holding:
            self._holding = False
            store = self._engine._managed.store
            for unit in range(store.units):
                store.unpin(unit)
            store.release_all()

    def _announce(self, move, detail=0.0):
        self._exchange(move, detail)

    # ---- a rank without data

    def _follow(self):
        engine = self._engine
        while True:
            move, detail, rates = self._exchange(Move.NOTHING)
            managed = engine._managed
            if move is Move.NOTHING:
                return
            if move is Move.FORWARD:
                managed.scheduler.shadow_forward()
            elif move is Move.DEFERRED_BACKWARD:
                managed.scheduler.shadow_backward()
            elif move is Move.BACKWARD:
                self._shadow_backward(detail)
            elif move is Move.REDUCTION:
                engine._flush_carry()
            elif move is Move.STEP:
                for group, rate in zip(engine.optimizer.param_groups, rates):
                    if group["lr"] != rate:
                        group["lr"] = rate
                engine._step(bool(detail))

    def _shadow_backward(self, post_scale):
        managed = self._engine._managed
        managed.reducer.set_refusal("")
        managed.reducer.set_post_scale(post_scale)
        # The others gather and reduce by turns, as their backward goes: neither of ours may wait for the other to finish.
        with ThreadPoolExecutor(1) as beside:
            flushed = beside.submit(managed.reducer.flush, True)
            managed.scheduler.shadow_backward()
            flushed.result()
        self._engine._set_default_scale()

    # ---- what is said

    def _exchange(self, move, detail=0.0):
        """(move, detail, learning rates) of the ranks with data; raises on all ranks when they disagree. Collective."""
        rates = [float(group["lr"]) for group in self._engine.optimizer.param_groups]
        form = f"qd{len(rates)}d"
        found = self._engine._managed.transports.world.all_gather_host(struct.pack(form, move, float(detail), *rates), "join")
        said = [(rank, *struct.unpack(form, item)) for rank, item in enumerate(found)]
        said = [entry for entry in said if entry[1] != Move.NOTHING]
        if not said:
            return Move.NOTHING, 0.0, []
        first = said[0]
        for other in said:
            if other[1:3] != first[1:3]:
                raise RuntimeError("join: ranks with data must run the same forwards, backwards and steps in one order: rank "
                                   f"{first[0]} begins {_describe(Move(first[1]), first[2])}, rank {other[0]} "
                                   f"{_describe(Move(other[1]), other[2])}")
        return Move(first[1]), first[2], first[3:]
