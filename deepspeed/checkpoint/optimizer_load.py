# SPDX-License-Identifier: Apache-2.0
"""The optimizer's part of a load: states, counts of updates, hyperparameters.

Note [All states or none]: a parameter continues with the states of the checkpoint when it has every state that the optimizer keeps;
otherwise it starts anew, its own count of updates included. Half of them would be worse than none: Adam's second moment of 0 behind
a thousand updates, for example, makes the next step thirty times too large.
"""
import torch

from deepspeed.checkpoint import dtypes
from deepspeed.checkpoint.pieces import RESERVED, Piece, state_key, state_kind

_FAMILIES = {"adam": "adam", "adamw": "adam", "fusedadam": "adam", "deepspeedcpuadam": "adam", "fusedlion": "lion",
             "deepspeedcpulion": "lion", "lion": "lion", "fusedlamb": "lamb", "lamb": "lamb", "adagrad": "adagrad",
             "deepspeedcpuadagrad": "adagrad"}


def family_of(name):
    """Optimizers of one family keep states of the same meaning."""
    return _FAMILIES.get(name.lower(), name)


class OptimizerLoad:

    def __init__(self, source, holdings, source_names, notes):
        """source_names: {name in the model: name in the checkpoint} of the parameters whose weights are loaded."""
        self.source, self.holdings, self.notes = source, holdings, notes
        self.stepper, self.optimizer = holdings.optimizer.stepper, holdings.optimizer.optimizer
        self.source_names = source_names
        self.saved = source.state.get("optimizer") or {}
        self.saved_class = self.saved.get("class")
        self.kinds = {}      # source name -> kinds of states it has
        for name, kind in source.tensors:
            if kind not in RESERVED:
                self.kinds.setdefault(name, []).append(kind)
        self.parts = source.slice_parts()
        self.steps, self.continued, self.missed = 0, {}, {}

    # ---- plan

    def plan(self):
        trained = self.holdings.trained
        for name, index in trained.items():
            kinds = self._kinds_to_take(name, index)
            if kinds is not None:
                self.continued[name] = kinds
        self.steps = int(self.saved.get("steps", 0)) if self.continued else 0
        for name, index in trained.items():
            if not self.holdings.names.parameters[name].numel():
                continue
            late = self._missed(name) if name in self.continued else self.steps
            if late:
                self.missed[index] = late
        anew = [name for name in trained if name not in self.continued and self.holdings.names.parameters[name].numel()]
        if anew and self.saved.get("steps"):
            what = "all parameters" if not self.continued else ", ".join(f"'{n}'" for n in anew[:4]) + ("..." if len(anew) > 4 else "")
            self.notes.append(f"the optimizer's state of {what} starts anew: the checkpoint ({self.saved_class or 'optimizer unknown'}) does "
                              f"not have what {type(self.optimizer).__name__} keeps of it")

    def _kinds_to_take(self, name, index):
        """The kinds of states this parameter continues with, None when it starts anew."""
        source_name = self.source_names.get(name)
        if source_name is None:
            return None
        there = self.kinds.get(source_name, [])
        needed = self.stepper.kinds_of(index)
        if needed is not None:
            kinds = [state_kind(key) for key in needed]
            return kinds if kinds and set(kinds) <= set(there) else None
        if self.saved_class not in (None, type(self.optimizer).__name__):
            return None
        if self.saved.get("fused"):   # written by a step of ours, which had no need of what this optimizer keeps besides
            return None
        return there if there or source_name in self.parts else None

    def _missed(self, name):
        source_name = self.source_names[name]
        missed = self.saved.get("missed_steps", {})
        if source_name in missed:
            return int(missed[source_name])
        own = self._shared_parts(source_name).get("step")
        return max(0, self.steps - int(own)) if own is not None else 0

    def _shared_parts(self, source_name):
        """Values beside the slices that hold for the whole parameter."""
        entries = self.parts.get(source_name, [])
        return entries[0][2] if entries else {}

    # ---- apply

    def fill(self, filling):
        """States into place; those that start anew become zero."""
        if self.stepper.kinds_of(next(iter(self.holdings.trained.values()), 0)) is None:
            self._fill_client(filling)
            return
        if not self.continued and not self.stepper.steps:
            return   # nothing was there, nothing comes
        self.stepper.ensure_state()
        self.stepper.steps = max(self.stepper.steps, 1)   # or its slices would not be shown
        for name, number, segment, first in self.holdings.segments():
            slices = self.stepper.slices_of(number, segment)
            for kind in self.continued.get(name, ()):
                self._add(filling, name, kind, first, slices.pop(state_key(kind)))
            for value in slices.values():
                value.zero_()

    def _add(self, filling, name, kind, first, data):
        info = self.source.tensors[self.source_names[name], kind]
        parameter = self.holdings.names.parameters[name]
        filling.add(info, Piece(info.name, kind, tuple(parameter.shape), self.holdings.described_order(name), first, data))

    def _fill_client(self, filling):
        self.optimizer.state.clear()
        for name, number, segment, first in self.holdings.segments():
            if name not in self.continued:
                continue
            source_name = self.source_names[name]
            parts = self._parts_for(source_name, first, segment.numel)
            if parts is None:
                self.notes.append(f"the optimizer's state of '{name}' starts anew: parts of it belong to another division among ranks")
                continue
            types = {state_key(kind): dtypes.torch_dtype(self.source.tensors[source_name, kind].dtype) for kind in self.continued[name]}
            slices = self.stepper.start_entry(segment, types, _on_device(parts, segment.parameter.device))
            for kind in self.continued[name]:
                self._add(filling, name, kind, first, slices[state_key(kind)])

    def _parts_for(self, source_name, first, numel):
        """The values beside the slices for this segment; None when they cannot be had."""
        entries = self.parts.get(source_name, [])
        for begin, count, values in entries:
            if (begin, count) == (first, numel):
                return values
        shared = self._shared_parts(source_name)
        return shared if all(not torch.is_tensor(v) or v.dim() == 0 for v in shared.values()) else None

    def finish(self):
        """Counts and hyperparameters."""
        self.stepper.set_progress(self.steps, self.missed)
        self._take_groups()

    def _take_groups(self):
        saved = self.saved.get("groups", [])
        if not saved:
            return
        if self.saved_class is not None and self.saved_class != type(self.optimizer).__name__ and \
                family_of(self.saved_class) != family_of(type(self.optimizer).__name__):
            self.notes.append(f"hyperparameters stay those of the configuration: the checkpoint was trained with {self.saved_class}")
            return
        same = self.saved_class in (None, type(self.optimizer).__name__)
        number_of = {name: number for number, group in enumerate(saved) for name in group["params"]}
        members = {}
        for name, index in self.holdings.trained.items():
            members.setdefault(self.holdings.optimizer.group_of[index], []).append(self.source_names.get(name))
        for number, group in enumerate(self.optimizer.param_groups):
            found = {number_of[n] for n in members.get(number, ()) if n in number_of}
            if not found and not members.get(number) and len(saved) == len(self.optimizer.param_groups):
                found = {number}   # an empty group has only its place
            if len(found) == 1:
                _write_values(group, saved[found.pop()]["values"], same)
            elif found:
                self.notes.append(f"parameter group {number} keeps its hyperparameters: in the checkpoint its parameters were in groups "
                                  f"{sorted(found)}")
            elif members.get(number):
                self.notes.append(f"parameter group {number} keeps its hyperparameters: in the checkpoint its parameters were in no group")


def _on_device(values, device):
    """torch keeps counts of updates on the host."""
    return {key: value.to(device) if torch.is_tensor(value) and value.dim() else value for key, value in values.items()}


def _write_values(group, values, all_keys):
    for key, value in values.items():
        if not all_keys and key not in group:
            continue
        if not all_keys and key == "decoupled_weight_decay":   # says which of two optimizers it is
            continue
        current = group.get(key)
        if torch.is_tensor(current) and current.numel() == 1:
            with torch.no_grad():
                current.fill_(float(value))   # a compiled step holds this very tensor
        elif key != "params":
            group[key] = value
