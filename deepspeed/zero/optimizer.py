# SPDX-License-Identifier: Apache-2.0
"""The optimizer that initialize() returns: the same step at every stage, over the slices this rank owns."""
import math
import struct
from dataclasses import dataclass, field

import torch

from deepspeed.device.host_memory import trim_heap
from deepspeed.telemetry import logger
from deepspeed.zero.managed import home_of
from deepspeed.zero.muon_step import MuonStep
from deepspeed.zero.offload_config import FOR_BACKWARD
from deepspeed.zero.shared_failure import on_every_rank
from deepspeed.zero.split_master import SplitValues
from deepspeed.zero.stepper import ClientStep, FusedStep, recognise
from deepspeed.zero.tensors import shaped_like

# Kinds of states that a value lies in: without a master of its own, the fp32 value is the weight.
_FOR_SLICE = {"fp32": ("lp_params", "hp_params"), "grad": ("lp_grads",), "state": ("optim_states",)}
_FOR_STATE = (*_FOR_SLICE["fp32"], *_FOR_SLICE["state"])

_PAGE_BYTES = 4096


class DeepSpeedOptimizer:
    """Base class of what initialize() returns as the optimizer."""


class ZeROOptimizer(DeepSpeedOptimizer):
    """Base class of the optimizers that work on slices."""


@dataclass
class SliceSegment:
    begin: int       # in the slice
    numel: int
    group: int
    param: int       # index in the store
    parameter: torch.nn.Parameter   # what the basic optimizer sees: a view of the master


@dataclass
class OptimizerSlice:
    flat: int
    master: torch.Tensor      # fp32, 1-D; of split masters a SplitValues, whose weights `low` are
    low: object               # the parameter memory to refresh, None when it is the master
    rests: bool = False       # its state rests where the configuration says, not where the model is
    in_file: bool = False     # low, or the master when there is none, is a mapping of a file
    apart: bool = False       # low is not on the master's device
    segments: list = field(default_factory=list)

    @property
    def is_split(self):
        return isinstance(self.master, SplitValues)

    @property
    def beside(self):
        """The memory that makes masters of the weights: fp32 values, or low bits. The master itself where it is the parameter."""
        return self.master.low_bits if self.is_split else self.master

    def refresh(self, begin=0, numel=None):
        """After masters were set: the parameter memory follows."""
        if self.low is not None and not self.is_split:
            numel = self.master.numel() if numel is None else numel
            self.low.narrow(0, begin, numel).copy_(self.master.narrow(0, begin, numel))


class NonFiniteError(FloatingPointError):
    """Gradients that are not finite, where no loss scaling can help."""


class ShardedOptimizer(ZeROOptimizer):
    """Gradient norm, clipping, the update and the refresh of parameters for a ManagedModel.

    `param_groups` are the very dicts of the basic optimizer: changing a learning rate there changes the next step. Their
    "params" are fp32 slices, one for each parameter this rank owns a part of.
    """

    def __init__(self, managed, optimizer, group_of, options):
        """group_of: parameter id -> index of its param group. options: StepOptions."""
        self.managed, self.optimizer, self.options = managed, optimizer, options
        self.loss_scaler = options.scaler
        self.overflow = False
        self.skipped_bad = 0
        self.torn = False    # some elements have been updated and others have not, on this rank or another
        self._norm = None
        self._clipped = False
        self.group_of = {index: group_of[id(p)] for index, p in enumerate(managed.params) if p is not None and id(p) in group_of}
        index_of = {id(p): index for index, p in enumerate(managed.params) if p is not None}
        self.caller_order = [index_of[key] for key in group_of if key in index_of]   # store indices, group by group as the caller listed them
        self.slices = self._make_slices(group_of)
        self._where = {}     # store index -> (slice number, segment)
        for number, s in enumerate(self.slices):
            for segment in s.segments:
                self._where[segment.param] = (number, segment)
        self._swap_params()
        known = recognise(optimizer)
        if (known is None or known[0] == "lamb") and any(s.is_split for s in self.slices):
            raise ValueError(f"bf16.split_master: the update of {type(optimizer).__name__} does not go element by element in this library and needs "
                             "whole fp32 masters: use Adam, AdamW, Lion, Adagrad or SGD, or set split_master to false")
        rest = managed.tiers.rest
        if rest is not None and (known is None or known[0] == "lamb"):
            raise ValueError(f"zero_optimization.offload_optimizer.device: the state of {type(optimizer).__name__} cannot rest elsewhere, since its "
                             "update does not go element by element in this library: use Adam, AdamW, Lion, Adagrad or SGD, or set device to \"none\"")
        if type(optimizer).__name__ == "MuonWithAuxAdam":
            self.stepper = MuonStep(optimizer, self.slices, managed, group_of, options.partial_slices)
        elif known is not None:
            kind, decoupled = known
            transport = managed.transports.shard if options.partial_slices else None
            self.stepper = FusedStep(optimizer, self.slices, kind, decoupled, managed.store.params, transport, rest)
        else:
            self.stepper = ClientStep(optimizer, self.slices)
        # Where replicas add their slices up after the reduction, no slice is final before the step.
        self._speculates = managed.tiers.speculates and isinstance(self.stepper, FusedStep) and managed.transports.replicate is None
        if self._speculates:
            managed.reducer.speculate_with(self.stepper.native, {s.flat: number for number, s in enumerate(self.slices)})
        if hasattr(rest, "folder"):
            rest.set_aside(self._file_bytes_to_come())
        managed.optimizer = self
        optimizer.add_param_group = self.add_param_group   # the basic optimizer's own would take what nothing steps

    # ---- construction

    def _make_slices(self, group_of):
        store, slices = self.managed.store, []
        partial = self.options.partial_slices
        for flat in range(store.flats):
            info = store.flat_info(flat)
            if not info["trainable"] or not info["slots"]:
                continue
            low = store.shard(flat) if partial else store.full(flat)
            master = store.master(flat)
            rests = store.state_rests(flat)
            apart = rests and self.managed.tiers.rest.apart and not store.shard_apart(flat)
            if info["dtype"] == torch.float32 and not apart:
                master, low = low, None
            elif master is None:
                store.make_master(flat)
                master = store.master(flat)
            if master.dtype == torch.int16:
                master = SplitValues(low, master)
            mapped = store.in_file(flat)
            s = OptimizerSlice(flat, master, low, rests, mapped, apart)
            for index, offset, numel in info["slots"]:
                parameter = self.managed.params[index]
                begin = offset
                if partial:
                    _, begin, numel = store.slice_of(index, store.rank)
                if numel == 0:
                    continue
                view = master.narrow(0, begin, numel)
                if numel == parameter.numel():
                    view = shaped_like(view, parameter)
                proxy = torch.nn.Parameter(view, requires_grad=True)
                proxy.ds_name = store.param_name(index)
                s.segments.append(SliceSegment(begin, numel, group_of[id(parameter)], index, proxy))
            slices.append(s)
        return slices

    def _file_bytes_to_come(self):
        """Of gradient slices, states and updates in advance, which the first two steps make: their space is there from the beginning."""
        states = len(self.stepper.state_names) * (2 if self.managed.tiers.speculates else 1)
        arrays = [(s, 4) for s in self.slices if s.rests] * (1 + states)
        if self._speculates:
            arrays += [(s, (s.master if s.low is None else s.low).element_size()) for s in self.slices if s.rests]
        return sum(-(-max(s.master.numel() * size, 1) // _PAGE_BYTES) * _PAGE_BYTES for s, size in arrays)

    def _swap_params(self):
        """The basic optimizer's groups now hold our slices; its dicts stay the caller's own."""
        state = dict(self.optimizer.state)
        if state:
            logger.warning("the optimizer already had state before deepspeed.initialize(); it starts anew")
            self.optimizer.state.clear()
        for number, group in enumerate(self.optimizer.param_groups):
            group["params"] = [seg.parameter for s in self.slices for seg in s.segments if seg.group == number]

    @staticmethod
    def add_param_group(param_group):
        """Refuses: what an engine trains is laid out once."""
        raise RuntimeError("add_param_group: deepspeed.initialize() has laid out the parameters the engine trains, and a group added now "
                           "would never be updated: put all groups into the optimizer before initialize() and freeze those that come later "
                           "with requires_grad_(False) until they are to be trained, or build a new engine")

    # ---- the step

    @property
    def loss_scale(self):
        return self.loss_scaler.loss_scale

    cur_scale = loss_scale

    @loss_scale.setter
    def loss_scale(self, value):
        self.loss_scaler.cur_scale = float(value)

    def override_loss_scale(self, loss_scale):
        self.loss_scaler.cur_scale = float(loss_scale)

    @property
    def dynamic_loss_scale(self):
        return self.loss_scaler.dynamic

    def check_overflow(self, partition_gradients=True):
        return self.overflow

    def _reduced_stats(self):
        reducer = self.managed.reducer
        stats = reducer.reduce_stats()
        if stats[2]:  # somebody still holds gradients that came too late for their round
            reducer.set_refusal("")
            reducer.flush_carry()
            stats = reducer.reduce_stats()
        if self.managed.transports.replicate is not None:
            reducer.add_replicas()
            stats = reducer.reduce_stats()
        return stats

    def expect_step(self, follows):
        """A backward is about to begin. `follows`: the step comes right after it, so slices can be updated as their gradients become final."""
        if not self._speculates:
            return
        # A step like the last one; while steps are clipped, the factor is known to nobody before the norm.
        speculate = follows and self.stepper.steps > 0 and not self._clipped
        self.managed.reducer.set_final(speculate)
        if speculate:
            self.stepper.foresee(1.0 / self.loss_scale)
        else:
            self.stepper.drop_speculation()

    def adopt_written(self):
        """Values that the caller has written into parameters since the last update count."""
        if self.managed.store.adopt_written() and self._speculates:
            self.stepper.drop_speculation()

    def step(self, closure=None):
        """One update from the gradients reduced so far; skipped, with `overflow` set, when they are not finite."""
        self.managed.refuse_while_away("optimizer.step")
        if self.torn:
            raise RuntimeError("optimizer.step: an earlier update has failed midway: load a checkpoint first")
        loss = closure() if closure is not None else None
        sum_squares, bad, _ = self._reduced_stats()
        self.adopt_written()
        self.overflow = self.options.on_bad != "step" and (bool(bad) or not math.isfinite(sum_squares))
        if self.overflow:
            self._skip()
            return loss
        self.skipped_bad = 0
        norm = math.sqrt(sum_squares) / self.loss_scale
        self._norm = norm if self.options.report_norm else None
        factor = 1.0 / self.loss_scale
        self._clipped = self.options.clip > 0 and norm > self.options.clip
        if self._clipped:
            factor *= self.options.clip / (norm + 1e-6)
        self._update(factor)
        self.loss_scaler.update_scale(False)
        return loss

    def _update(self, factor):
        managed = self.managed
        managed.scheduler.drop_kept()  # a graph kept by create_graph would see values of before the step
        managed.reducer.gather_grads()
        if self.stepper.overwrites_gradients and not self.options.partial_slices and managed.transports.shard.size > 1:
            managed.transports.shard.barrier("gathered_grads")   # a peer may still be reading this rank's part of them
        read = managed.reducer.grad_slice if self.options.partial_slices else managed.reducer.grad
        if self.stepper.steps == 0:
            trim_heap()  # before the optimizer state takes its place: what building the model and the first graph left behind
        self._step(lambda: self.stepper.step([read(s.flat) for s in self.slices], factor, managed.reducer.frozen()))
        self.optimizer._opt_called = True  # torch's schedulers ask whether step() has run
        managed.reducer.zero()
        if self.options.partial_slices:
            managed.store.publish_all()
            managed.store.refresh_full()
        managed.leave_files()

    def _step(self, update):
        """Where state rests elsewhere an update can fail on one rank: all hear of it before anybody waits for the new weights."""
        if not (self.managed.tiers.in_files or self.managed.tiers.rest):
            update()
            return
        try:
            on_every_rank(self.managed.transports.world, update, "the update")
        except Exception:
            self.torn = True
            raise

    def _skip(self):
        where = self._first_bad()
        self._norm = float("inf") if self.options.report_norm else None
        if self._speculates:
            self.stepper.drop_speculation()
        self.managed.reducer.zero()
        self.skipped_bad += 1
        options = self.options
        if options.on_bad == "raise":
            raise NonFiniteError(f"gradients are not finite{where} at step {options.step_number()}: the loss is probably NaN or infinite. "
                                 "Look at the data and the learning rate; fp16 and bf16 skip such steps")
        before = self.loss_scale
        self.loss_scaler.update_scale(True, where)
        if options.on_bad == "scale":
            logger.warning(f"step {options.step_number()} skipped: gradients overflow{where}; loss scale {before:g} -> {self.loss_scale:g}")
        else:
            logger.warning(f"step {options.step_number()} skipped: gradients are not finite{where}")
            if self.skipped_bad >= options.most_bad_in_a_row:
                raise NonFiniteError(f"{self.skipped_bad} steps in a row had gradients that are not finite{where}: the model has diverged")

    def _first_bad(self):
        """Text naming the first bad parameter, and the rank it came from; the same on every rank. Collective."""
        param, rank = self.managed.reducer.find_bad()
        found = self.managed.transports.reduce.all_gather_host(struct.pack("qq", param, rank), "first_bad")
        entries = [struct.unpack("qq", item) for item in found]
        entries = [e for e in entries if e[0] >= 0]
        if not entries:
            return ""
        param, rank = min(entries)
        name = self.managed.store.param_name(param)
        return f" in parameter '{name}'" + (f" on rank {rank}" if rank >= 0 else "")

    def zero_grad(self, set_to_none=True):
        self.managed.refuse_while_away("optimizer.zero_grad", "lp_grads")
        self.managed.reducer.zero()

    def backward(self, loss, retain_graph=False):
        """Scales the loss and runs its backward (what engine.backward does, without the division by accumulation steps)."""
        self.managed.refuse_while_away("optimizer.backward", *FOR_BACKWARD)
        self.managed.reducer.set_refusal("")
        (loss.float() * self.loss_scale).backward(retain_graph=retain_graph)

    # ---- what callers read

    @property
    def param_groups(self):
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, value):
        self.optimizer.param_groups = value

    @property
    def state(self):
        return self.optimizer.state

    @state.setter
    def state(self, value):
        self.optimizer.state = value

    @property
    def defaults(self):
        return self.optimizer.defaults

    @property
    def parameter_offload(self):
        return self.options.parameter_offload

    def get_global_norm(self):
        return self._norm

    @property
    def _global_grad_norm(self):
        return self._norm

    def get_lr(self):
        return [group["lr"] for group in self.param_groups]

    def set_lr(self, lr):
        for group in self.param_groups:
            group["lr"] = lr

    def state_dict(self):
        """This rank's part: slices keyed by parameter name, the groups' hyperparameters, the loss scale."""
        self.managed.refuse_while_away("optimizer.state_dict", *_FOR_STATE)
        state = {}
        for number, s in enumerate(self.slices):
            for segment in s.segments:
                name = self.managed.store.param_name(segment.param)
                entry = {"fp32": s.master.narrow(0, segment.begin, segment.numel)}
                entry.update({k: v for k, v in self.optimizer.state.get(segment.parameter, {}).items()})
                state[name] = entry
        groups = [{k: v for k, v in g.items() if k != "params"} for g in self.param_groups]
        return {"state": state, "param_groups": groups, "loss_scaler": self.loss_scaler.state_dict(), "steps": self.stepper.steps,
                "missed_steps": {self.managed.store.param_name(p): n for p, n in self.stepper.missed_steps.items()}}

    def load_state_dict(self, state_dict):
        """Takes over a state_dict() of the same rank, world size and model."""
        self.managed.refuse_while_away("optimizer.load_state_dict", *_FOR_STATE)
        for number, s in enumerate(self.slices):
            for segment in s.segments:
                name = self.managed.store.param_name(segment.param)
                if name not in state_dict["state"]:
                    raise KeyError(f"optimizer state of parameter '{name}' is missing in the state_dict")
        self.stepper.ensure_state()
        with torch.no_grad():
            for number, s in enumerate(self.slices):
                for segment in s.segments:
                    entry = state_dict["state"][self.managed.store.param_name(segment.param)]
                    s.master.narrow(0, segment.begin, segment.numel).copy_(entry["fp32"])
                    own = self.optimizer.state[segment.parameter]
                    for key, value in entry.items():
                        if key == "fp32":
                            continue
                        if torch.is_tensor(own.get(key)) and torch.is_tensor(value):
                            own[key].copy_(value)
                        else:
                            own[key] = value.clone() if torch.is_tensor(value) else value
                s.refresh()
        for group, saved in zip(self.param_groups, state_dict["param_groups"]):
            group.update(saved)
        self.loss_scaler.load_state_dict(state_dict["loss_scaler"])
        self.stepper.steps = state_dict["steps"]
        missed = state_dict.get("missed_steps", {})
        names = {p: self.managed.store.param_name(p) for p in self._where}
        self.stepper.missed_steps = {p: missed[name] for p, name in names.items() if name in missed}
        self._publish()
        self.managed.leave_files()

    # ---- slices by parameter

    def slices_are_partial(self, kind):
        if kind == "grad":
            return self.managed.transports.shard.size > 1 and self.options.partial_slices
        return self.options.partial_slices

    def gradient_was_set(self, parameter):
        """The caller has written into the slice of its gradient. With replicas the first one's value counts: step() adds them up."""
        self.managed.reducer.mark_edited(self.managed.store.param_place(home_of(parameter).index)[1])
        replicate = self.managed.transports.replicate
        if replicate is not None and replicate.rank > 0:
            self.slice_of(parameter, "grad").zero_()

    def read_slice(self, parameter, kind, key=None):
        """slice_of(), for reading: with replicas a gradient is the sum over all of them, a copy. Collective over the replicas then."""
        mine = self.slice_of(parameter, kind, key)
        replicate = self.managed.transports.replicate
        if kind != "grad" or mine is None or replicate is None:
            return mine
        parts = replicate.all_gather_host(mine.cpu().numpy().tobytes(), "read_replicas")
        if not mine.numel():
            return mine
        total = torch.zeros_like(mine)
        for part in parts:
            total += torch.frombuffer(bytearray(part), dtype=mine.dtype).to(mine.device)
        return total

    def slice_of(self, parameter, kind, key=None):
        """This rank's slice of a parameter's "fp32", "grad" or "state" value as a 1-D view; None when there is none on any rank."""
        home = home_of(parameter)
        self.managed.refuse_while_away(f"the {key or kind} of parameter '{home.name}'", *_FOR_SLICE[kind])
        entry = self._where.get(home.index)
        trained = self.managed.store.flat_info(self.managed.store.param_place(home.index)[1])["trainable"]
        if not trained:
            return None
        if kind == "grad":
            reducer = self.managed.reducer
            flat = self.managed.store.param_place(home.index)[1]
            if not reducer.has_grad(flat):
                return None
            if not self.options.partial_slices:
                shard = self.managed.transports.shard  # nobody may change what a peer still reads, before or after
                shard.barrier("read_grads")
                reducer.gather_grads()
                shard.barrier("read_grads")
        if kind == "state" and not self.stepper.has_state(home.index, key):
            return None
        if entry is None:  # my slice is empty; another rank's is not
            return torch.empty(0, device=self.managed.device)
        number, segment = entry
        s = self.slices[number]
        if kind == "fp32":
            return s.master.narrow(0, segment.begin, segment.numel)
        if kind == "state":
            return self.stepper.state_of(number, segment, key)
        read = self.managed.reducer.grad_slice if self.options.partial_slices else self.managed.reducer.grad
        return read(s.flat).narrow(0, segment.begin, segment.numel)

    def refresh_parameter(self, parameter):
        """After this rank's fp32 slice was set: the parameter itself follows, on all ranks. Collective."""
        entry = self._where.get(home_of(parameter).index)
        if entry is not None:
            number, segment = entry
            self.slices[number].refresh(segment.begin, segment.numel)
        self._publish()

    def _publish(self):
        if self.options.partial_slices:
            store = self.managed.store
            self.managed.transports.shard.barrier("set_parameter")
            store.publish_all()
            store.refresh_full()

    def destroy(self):
        self.optimizer.__dict__.pop("add_param_group", None)
        self.slices = []
        self._where = {}

