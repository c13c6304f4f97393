# SPDX-License-Identifier: Apache-2.0
"""Which update runs on the slices: our fused step where the optimizer is one it computes, else the optimizer's own."""
import torch

from deepspeed._native import lib
from deepspeed.zero.tensors import in_memory_order


def _adam(optimizer, decoupled_of):
    if any(g.get("amsgrad") or g.get("maximize") or g.get("differentiable") or isinstance(g["lr"], torch.Tensor) and g["lr"].requires_grad
           for g in optimizer.param_groups):
        return None
    return "adam", decoupled_of


def recognise(optimizer):
    """(kind, decoupled(group)) of an optimizer the fused step computes exactly, else None. Subclasses may differ: exact types only."""
    kind, groups = type(optimizer), optimizer.param_groups
    if kind in (torch.optim.Adam, torch.optim.AdamW):
        return _adam(optimizer, lambda g: g.get("decoupled_weight_decay", kind is torch.optim.AdamW))
    if kind is torch.optim.SGD and not any(g.get("maximize") or g.get("differentiable") for g in groups):
        return "sgd", None
    if kind is torch.optim.Adagrad and not any(g.get("maximize") or g.get("differentiable") or g.get("lr_decay")
                                               or g.get("initial_accumulator_value") for g in groups):
        return "adagrad", None
    if kind.__module__.startswith("deepspeed.ops."):
        name = kind.__name__
        if hasattr(optimizer, "storage") and not optimizer.storage.is_plain:
            raise ValueError(f"optimizer: {name} was made with master, rounding or state_dtype, but the engine keeps master values and states "
                             "itself: leave these options out")
        if name in ("FusedAdam", "DeepSpeedCPUAdam"):
            mode = bool(getattr(optimizer, "adam_w_mode", getattr(optimizer, "adamw_mode", True)))
            return _adam(optimizer, lambda g: mode)
        if name in ("FusedLion", "DeepSpeedCPULion"):
            return "lion", None
        if name == "DeepSpeedCPUAdagrad":
            return "adagrad", None
        if name == "FusedLamb":
            return "lamb", None
        if name == "FusedSGD":
            return "sgd", None
    return None


def hyper_of(group, step, kind, decoupled_of, defaults):
    """The values of a parameter group as C++ reads them; lr may be a tensor."""
    h = lib().Hyper()
    h.lr = float(group["lr"])
    h.weight_decay = float(group.get("weight_decay", 0.0))
    h.step = step
    if "betas" in group:
        h.beta1, h.beta2 = (float(b) for b in group["betas"])
    h.eps = float(group.get("eps", 0.0))
    h.momentum = float(group.get("momentum", 0.0) or 0.0)
    h.dampening = float(group.get("dampening", 0.0) or 0.0)
    h.nesterov = bool(group.get("nesterov", False))
    h.bias_correction = bool(group.get("bias_correction", True))
    h.decoupled = bool(decoupled_of(group)) if decoupled_of is not None else True
    if kind == "lamb":
        h.max_coeff = float(group.get("max_coeff", defaults.get("max_coeff", 10.0)))
        h.min_coeff = float(group.get("min_coeff", defaults.get("min_coeff", 0.01)))
        h.eps_inside_sqrt = bool(group.get("eps_inside_sqrt", False))
    return h


_ALIASES = {"sum": "exp_avg_sq"}  # torch's Adagrad


class FusedStep:
    """Our step: state lies in C++, the optimizer object keeps the hyperparameters and shows the state."""

    def __init__(self, optimizer, slices, kind, decoupled_of, params, transport, rest=None):
        self.optimizer, self.slices, self.kind, self._decoupled_of = optimizer, slices, kind, decoupled_of
        self.native = lib().SliceOptimizer(kind, params, transport, rest)
        for s in slices:
            self.native.add_slice(s.beside, s.low, [(g.begin, g.numel, g.group, g.param) for g in s.segments], s.rests, s.in_file, s.apart)
        self.overwrites_gradients = kind == "lamb"
        self.steps = 0
        self._step_tensor = torch.zeros(())
        self._own_counts = False   # whether some parameter has missed an update
        self.state_names = self.native.state_names()

    def _hypers(self):
        return [hyper_of(g, self.steps, self.kind, self._decoupled_of, self.optimizer.defaults) for g in self.optimizer.param_groups]

    def foresee(self, grad_scale):
        """The next step will probably be this one: what is ready of it is computed beside backward (Note [Speculative updates])."""
        self.steps += 1
        try:
            self.native.foresee(self._hypers(), grad_scale)
        finally:
            self.steps -= 1

    def drop_speculation(self):
        """Something that the update is computed from changes, or there will be none."""
        self.native.drop_speculation()

    def step(self, grads, grad_scale, frozen=()):
        """`frozen`: numbers of the parameters that stay as they are."""
        self.steps += 1
        self.native.step(self._hypers(), grads, grad_scale, frozen)
        self._step_tensor.fill_(self.steps)
        if self.steps == 1 or frozen or self._own_counts:
            self.show_state()

    @property
    def missed_steps(self):
        """{parameter: updates that passed it over}: its own count of updates is so much smaller than `steps`."""
        return self.native.missed_steps()

    @missed_steps.setter
    def missed_steps(self, missed):
        self.native.set_missed_steps(missed)
        self._own_counts = bool(missed)

    def show_state(self):
        """optimizer.state[p] as torch keeps it, as views of the state in C++."""
        names = self.state_names
        if self.kind == "adagrad" and type(self.optimizer) is torch.optim.Adagrad:
            names = ["sum"]
        missed = self.missed_steps
        self._own_counts = bool(missed)
        for index, s in enumerate(self.slices):
            states = self.native.states(index)
            for segment in s.segments:
                entry = self.optimizer.state[segment.parameter]
                late = missed.get(segment.param, 0)
                entry["step"] = self._step_tensor - late if late else self._step_tensor
                for name, state in zip(names, states):
                    entry[name] = state.narrow(0, segment.begin, segment.numel)

    def has_state(self, param, key):
        """Whether the state exists, the same answer on every rank."""
        return self.steps > 0 and _ALIASES.get(key, key) in self.state_names

    def state_of(self, segment_slice, segment, key):
        states = self.native.states(segment_slice)
        return states[self.state_names.index(_ALIASES.get(key, key))].narrow(0, segment.begin, segment.numel) if states else None

    def state_bytes(self):
        return self.native.state_bytes()

    # ---- for checkpoints, which call Adagrad's sum of squares a sum, as torch does: it is no running average

    def kinds_of(self, param):
        """Names of the states that every slice of this parameter has."""
        return ["sum"] if self.kind == "adagrad" else list(self.state_names)

    def slices_of(self, number, segment):
        """{kind: this segment's part, 1-D}; empty before the first update."""
        states = self.native.states(number)
        if not states or not self.steps:
            return {}
        return {kind: state.narrow(0, segment.begin, segment.numel) for kind, state in zip(self.kinds_of(segment.param), states)}

    def memory_of(self, number):
        """The states of a slice as they lie in memory."""
        return list(self.native.states(number) or ())

    def parts_of(self, segment):
        """{key: value} of state that is no slice."""
        return {}

    def set_progress(self, steps, missed):
        """`steps` updates lie behind, of which parameters have missed as many as `missed` says."""
        self.steps = steps
        self.missed_steps = missed
        self.native.set_whole()
        self._step_tensor.fill_(steps)
        if self.slices and self.native.states(0):
            self.show_state()

    def ensure_state(self):
        self.native.ensure_states()
        self.show_state()


class ClientStep:
    """Any torch optimizer: it sees one fp32 parameter for each slice, shaped like the whole parameter where the slice is whole."""

    overwrites_gradients = True   # unscales them in place

    def __init__(self, optimizer, slices):
        self.optimizer, self.slices = optimizer, slices
        self.steps = 0

    missed_steps = {}   # the optimizer itself counts each parameter's updates

    def step(self, grads, grad_scale, frozen=()):
        self.steps += 1
        frozen = set(frozen)
        for s, grad in zip(self.slices, grads):
            if grad_scale != 1.0:
                grad.mul_(grad_scale)
            for segment in s.segments:
                if segment.param in frozen:
                    continue
                segment.parameter.grad = torch.as_strided(
                    grad, segment.parameter.shape, segment.parameter.stride(), grad.storage_offset() + segment.begin)
        self.optimizer.step()
        for s in self.slices:
            for segment in s.segments:
                segment.parameter.grad = None
            s.refresh()

    def has_state(self, param, key):
        """Whether the state exists; ranks agree as long as parameters have the same kinds of state."""
        return any(key in self.optimizer.state.get(g.parameter, {}) for s in self.slices for g in s.segments)

    def state_of(self, segment_slice, segment, key):
        value = self.optimizer.state.get(segment.parameter, {}).get(key)
        if not torch.is_tensor(value) or value.numel() != segment.numel:
            return None
        return in_memory_order(value, segment.parameter) if value.shape == segment.parameter.shape else value.reshape(-1)

    def set_progress(self, steps, missed):
        """`steps` updates lie behind; the optimizer's own state says how many each parameter has had."""
        self.steps = steps

    def ensure_state(self):
        pass

    def kinds_of(self, param):
        """None: the optimizer decides at its first update."""
        return None

    def _is_slice(self, key, value, segment):
        return torch.is_tensor(value) and value.shape == segment.parameter.shape and (value.dim() > 0 or key != "step")

    def slices_of(self, number, segment):
        state = self.optimizer.state.get(segment.parameter, {})
        return {key: in_memory_order(value, segment.parameter) for key, value in state.items() if self._is_slice(key, value, segment)}

    def memory_of(self, number):
        return [value for segment in self.slices[number].segments for value in self.slices_of(number, segment).values()]

    def parts_of(self, segment):
        state = self.optimizer.state.get(segment.parameter, {})
        return {key: value for key, value in state.items() if not self._is_slice(key, value, segment)}

    def start_entry(self, segment, types, parts):
        """New state of a segment: a slice for each (kind, dtype) of `types`, returned as {kind: 1-D tensor}, and the values `parts`."""
        like, entry, flats = segment.parameter, self.optimizer.state[segment.parameter], {}
        entry.clear()
        for kind, dtype in types.items():
            value = torch.empty_strided(like.shape, like.stride(), dtype=dtype, device=like.device)
            entry[kind] = value
            flats[kind] = torch.as_strided(value, (value.numel(),), (1,))
        entry.update(parts)
        return flats

    def state_bytes(self):
        tensors = [value for state in self.optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
        return sum(value.numel() * value.element_size() for value in tensors if value.dim() > 0)
