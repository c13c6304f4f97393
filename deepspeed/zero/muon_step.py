# SPDX-License-Identifier: Apache-2.0
"""Muon over slices: momentum is kept where the slice is; the orthogonalised update needs whole matrices.

Each matrix's update is gathered from its owners, orthogonalised on every rank alike, and each rank applies its own part. The other
parameters take the fused Adam.
"""
import torch

from deepspeed._native import lib
from deepspeed.zero.stepper import hyper_of
from deepspeed.zero.tensors import in_memory_order, shaped_like


class MuonStep:

    overwrites_gradients = False

    def __init__(self, optimizer, slices, managed, group_of, partial):
        self.optimizer, self.slices, self.managed, self.partial = optimizer, slices, managed, partial
        self.steps = 0
        groups = optimizer.param_groups
        self._where = {seg.param: (number, seg) for number, s in enumerate(slices) for seg in s.segments}
        # All matrices, also those of which this rank owns nothing: the gathering is collective.
        self._matrices = [(index, group_of[id(p)], p) for index, p in enumerate(managed.params)
                          if p is not None and id(p) in group_of and groups[group_of[id(p)]].get("use_muon")]
        muon = {index for index, _, _ in self._matrices}
        self._momentum = {index: torch.zeros_like(slices[number].master.narrow(0, seg.begin, seg.numel))
                          for index, (number, seg) in self._where.items() if index in muon}
        self._adam = lib().SliceOptimizer("adam", managed.store.params, None)
        self._adam_parts = []    # (slice number, segment): one native slice each, for matrices lie between them
        for number, s in enumerate(slices):
            for seg in s.segments:
                if seg.param not in muon:
                    low = s.low.narrow(0, seg.begin, seg.numel) if s.low is not None else None
                    self._adam.add_slice(s.master.narrow(0, seg.begin, seg.numel), low, [(0, seg.numel, seg.group, seg.param)])
                    self._adam_parts.append((number, seg))

    def step(self, grads, grad_scale, frozen=()):
        """`frozen`: numbers of the parameters that stay as they are."""
        self.steps += 1
        groups = self.optimizer.param_groups
        hypers = [hyper_of(g, self.steps, "adam", None, self.optimizer.defaults) for g in groups]
        self._adam.step(hypers, [grads[number].narrow(0, seg.begin, seg.numel) for number, seg in self._adam_parts], grad_scale,
                        frozen)
        with torch.no_grad():
            for index, group, parameter in self._matrices:
                if index in frozen:
                    continue
                self._step_matrix(index, groups[group], parameter, grads, grad_scale)
        for s in self.slices:
            s.refresh()

    def _step_matrix(self, index, group, parameter, grads, grad_scale):
        from deepspeed.ops.muon import _orthogonaliser
        beta = group.get("momentum", 0.95)
        number, seg = self._where.get(index, (None, None))
        update = torch.empty(0, device=self.managed.device)
        if seg is not None:
            grad = grads[number].narrow(0, seg.begin, seg.numel) * grad_scale
            momentum = self._momentum[index].lerp_(grad, 1 - beta)
            update = torch.lerp(grad, momentum, beta)
        if self.partial:
            update = self.managed.store.gather_slices(index, update)
        matrix = shaped_like(update, parameter)
        matrix = matrix.flatten(1) if matrix.ndim > 2 else matrix
        matrix = _orthogonaliser(group.get("ns_method", "gram"))(matrix)
        matrix = matrix * max(1.0, matrix.size(-2) / matrix.size(-1))**0.5
        if seg is None:
            return
        begin = self.managed.store.slice_of(index, self.managed.store.rank)[0] if self.partial else 0
        target = self.slices[number].master.narrow(0, seg.begin, seg.numel)
        target.mul_(1 - group["lr"] * group.get("weight_decay", 0.0))
        matrix = in_memory_order(matrix.reshape(parameter.shape), parameter)
        target.add_(matrix[begin:begin + seg.numel].to(target.dtype), alpha=-group["lr"])

    @property
    def missed_steps(self):
        return self._adam.missed_steps()

    @missed_steps.setter
    def missed_steps(self, missed):
        self._adam.set_missed_steps(missed)

    def has_state(self, param, key):
        """Whether the parameter with this number in the store has the state, the same answer on every rank."""
        muon = any(param == index for index, _, _ in self._matrices)
        return self.steps > 0 and (key == "momentum_buffer" if muon else key in self._adam.state_names())

    def state_of(self, segment_slice, segment, key):
        if segment.param in self._momentum:
            return self._momentum[segment.param] if key == "momentum_buffer" else None
        names = self._adam.state_names()
        part = next(i for i, (_, seg) in enumerate(self._adam_parts) if seg.param == segment.param)
        states = self._adam.states(part)
        return states[names.index(key)] if states and key in names else None

    def kinds_of(self, param):
        """Names of the states that every slice of this parameter has."""
        return ["momentum_buffer"] if any(param == index for index, _, _ in self._matrices) else list(self._adam.state_names())

    def slices_of(self, number, segment):
        """{kind: this segment's part, 1-D}; empty before the first update."""
        if not self.steps:
            return {}
        found = {kind: self.state_of(number, segment, kind) for kind in self.kinds_of(segment.param)}
        return {kind: value for kind, value in found.items() if value is not None}

    def memory_of(self, number):
        return [value for segment in self.slices[number].segments for value in self.slices_of(number, segment).values()]

    def parts_of(self, segment):
        """{key: value} of state that is no slice."""
        return {}

    def set_progress(self, steps, missed):
        """`steps` updates lie behind, of which parameters have missed as many as `missed` says."""
        self.steps = steps
        self.missed_steps = {param: late for param, late in missed.items() if param not in self._momentum}
        self.ensure_state()

    def ensure_state(self):
        names = self._adam.state_names()
        for part, (number, seg) in enumerate(self._adam_parts):
            if not self._adam.states(part):
                master = self.slices[number].master.narrow(0, seg.begin, seg.numel)
                self._adam.set_states(part, [torch.zeros_like(master) for _ in names])
            self.optimizer.state[seg.parameter].update(zip(names, self._adam.states(part)))
        for index, momentum in self._momentum.items():
            self.optimizer.state[self._where[index][1].parameter]["momentum_buffer"] = momentum

    def state_bytes(self):
        return self._adam.state_bytes() + sum(m.numel() * m.element_size() for m in self._momentum.values())
