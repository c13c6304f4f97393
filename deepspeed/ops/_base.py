# SPDX-License-Identifier: Apache-2.0
"""What the fused optimizers share: parameter groups, states, and the way from a group to one call of a kernel.

Note [Where an update runs]: parameters on the CPU, and on a GPU if CUDA code was built, are updated in C++ (``deepspeed._C``), all of a
group's parameters in one call. On any other device the same formula runs in torch operations (``deepspeed.ops.reference``).
"""
import collections
import contextlib
import re

import torch

from deepspeed._native import lib
from deepspeed.ops._shards import as_part_of, describe, is_dtensor, is_plain, local_part
from deepspeed.ops._storage import OPTION_NAMES, Storage

# Keys of torch.optim groups that would change the update and that these optimizers do not have.
_REFUSED = ("amsgrad", "maximize", "differentiable")
_HARMLESS = ("foreach", "fused", "capturable")  # those that choose among torch's implementations of one update


def _number(key, value):
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{key} must be a number, got {value!r}") from None


def _are_two_below_one(betas):
    betas = tuple(betas)
    return len(betas) == 2 and all(0.0 <= _number("betas", beta) < 1.0 for beta in betas)


class FusedOptimizer(torch.optim.Optimizer):
    """Base of the fused optimizers.

    Parameters may be float32, bfloat16 or float16 of any shape; the arithmetic is float32 and what is narrower is rounded once,
    when written. The given parameter-group dicts are kept, not copied, and read anew at every step; keys that are not known are left alone.
    ``state[p]`` holds ``step`` (int) and the tensors named in ``state_names``, float32 unless ``fp32_optimizer_states`` is false or the
    options of ``deepspeed.ops._storage`` say otherwise.
    A DTensor is updated where its elements lie, without communication; its states are DTensors of its placements.
    """

    state_names = ()
    needed_states = ()  # what a saved state cannot do without; the others start at zero
    torch_names = {}  # what torch.optim calls a state, where it differs
    unsigned_states = ("exp_avg_sq",)  # those that are never negative
    has_whole_norms = False  # whether the update needs numbers of a whole parameter: then not of a DTensor's part
    _has_dtensors = _has_repeats = False
    _settings = ("_storage", "_has_dtensors", "_has_repeats")  # attributes that copies and pickles carry; torch carries defaults, state and param_groups alone

    def __init__(self, params, defaults, fp32_optimizer_states=True, **options):
        flags = {key: options.pop(key) for key in (*_HARMLESS, *_REFUSED) if key in options}
        for key in options:
            if key not in OPTION_NAMES:
                raise TypeError(f"{type(self).__name__} takes no argument {key!r}")
        self._storage = Storage(type(self).__name__, fp32_optimizer_states, **options)
        self._numbers = {}
        super().__init__(params, {**flags, **defaults})

    def __getstate__(self):
        return {**super().__getstate__(), **{name: self.__dict__[name] for name in self._settings if name in self.__dict__}}

    def __setstate__(self, state):
        """Also of pickles that carry no settings, and what torch's load_state_dict calls with state and groups alone."""
        super().__setstate__(state)
        if "_storage" not in self.__dict__:
            self._storage = Storage.of_states(type(self).__name__, self.state, self.state_names)
        self._numbers = {}

    @property
    def storage(self):
        """How master values and states are kept."""
        return self._storage

    def add_param_group(self, param_group):
        with all_or_nothing(self):
            super().add_param_group(param_group)
            self._check_groups(len(self.param_groups) - 1)
            self._check_params(self.param_groups[-1])

    def _check_params(self, group):
        self._has_repeats |= len(set(group["params"])) < len(group["params"])  # torch has warned of it
        for p in group["params"]:
            if not is_plain(p):
                self._check_subclass(p)
                self._has_dtensors = True
            if self._storage.is_split and p.dtype == torch.float16:
                raise ValueError(f"{type(self).__name__}: {name_of(self, p)}: master='split' needs bfloat16 parameters: float16 is no upper half "
                                 "of a float32")

    def _check_subclass(self, p):
        if not is_dtensor(p):
            raise opaque_refused(self, p)
        if self.has_whole_norms:
            raise dtensor_refused(self, p)
        if self._storage.is_split or self._storage.is_stochastic or self._storage.is_8bit:
            raise ValueError(f"{type(self).__name__}: {name_of(self, p)} is a DTensor: master='split', rounding='stochastic' and state_dtype='8bit' "
                             "are for parameters in one piece: leave the option out")

    def _check_step(self):
        """Before anything moves."""
        self._check_groups()

    def _check_groups(self, first=0):
        """Refuses what the update cannot do, whoever wrote it into a group: the constructor's caller, a schedule or a loaded state."""
        for number, group in enumerate(self.param_groups[first:], first):
            try:
                self._check_group(group)
            except (TypeError, ValueError) as error:
                raise type(error)(f"{type(self).__name__}: parameter group {number}: {error}") from None

    def _check_group(self, group):
        for key in _REFUSED:
            if group.get(key):
                raise ValueError(f"{key} is not supported")
        for key in ("lr", "eps", "weight_decay"):
            if key not in group:
                continue
            if isinstance(group[key], (tuple, list, str)):
                raise TypeError(f"{key} must be a number, got {group[key]!r}. If these parameter groups were made for another "
                                "optimizer (Accelerate turns any into DeepSpeedCPUAdam when zero_optimization.offload_optimizer is on), use "
                                "AdamW, or set \"zero_force_ds_cpu_optimizer\": false in the configuration")
            if not _number(key, group[key]) >= 0.0:
                raise ValueError(f"{key} must not be negative or NaN, got {group[key]}")
        if "betas" in group and not _are_two_below_one(group["betas"]):
            raise ValueError(f"betas must be two numbers in [0, 1), got {group['betas']}")

    def _names_in(self, group):
        """The states that a group's parameters have."""
        return self.state_names

    # Not for torch.compile: there is nothing in it to compile, but a line for each of a model's parameters to trace.
    @torch._disable_dynamo
    @torch.no_grad()
    def step(self, closure=None):
        """One update of every parameter that has a gradient; returns the closure's loss, if one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_step()
        for group in self.param_groups:
            self._step_group(group)
        return loss

    def _step_group(self, group):
        """One update of the group."""
        for part in self._rounds(group) if self._has_repeats else (group,):
            self._step_part(group, part)

    @staticmethod
    def _rounds(group):
        """A parameter that a group holds twice is updated twice in a step, as by torch: groups of the first occurrences, the second ones, .."""
        rounds, count = [], collections.Counter()
        for p in group["params"]:
            if count[p] == len(rounds):
                rounds.append({**group, "params": []})
            rounds[count[p]]["params"].append(p)
            count[p] += 1
        return rounds

    def _step_part(self, group, part):
        """A batch that is refused leaves no trace: states appear and steps count when the update is done."""
        names = self._names_in(group)
        for (_, _, step, is_new), (params, grads, states) in self._batches(part).items():
            device = params[0].device
            backend = _backend(device)
            now = [{"step": 0, **self._fresh(p, names), **s} for p, s in zip(params, states)] if is_new else states
            options = self._storage.call_options(params, now, names, step, self._places)
            if options and backend is not lib():
                raise ValueError(f"{type(self).__name__}: {', '.join(options)}: no kernel for parameters on {device}")
            lists = [params, grads, *([s[name] for s in now] for name in names)]
            if self._has_dtensors:
                lists = self._local(*lists)
            try:
                self._update(group, step, is_new, *lists[:2], lists[2:], backend, options)
            except ValueError as error:
                raise ValueError(f"{type(self).__name__}: {self._owner(str(error), params)}{error}") from None
            for state, tensors in zip(states, now):
                if is_new:
                    state.update(tensors)
                state["step"] = step

    def _places(self, params):
        """The parameters' places in the groups, counted through. Somebody may have put another parameter into a group's list."""
        if any(p not in self._numbers for p in params):
            self._numbers = {p: i for i, p in enumerate(p for group in self.param_groups for p in group["params"])}
        return [self._numbers[p] for p in params]

    def _owner(self, message, params):
        """Whose array a kernel's message blames, which counts those of its call."""
        index = re.search(r"^\w+\[(\d+)\]", message)
        return f"{name_of(self, params[int(index[1])])}: " if index else ""

    def _fresh(self, p, names):
        if is_plain(p):
            return self._storage.fresh(p, names, self.unsigned_states)
        tensors = self._storage.fresh(local_part(p, p), names, self.unsigned_states)
        return {key: as_part_of(p, tensor) for key, tensor in tensors.items()}

    def _local(self, params, *lists):
        """The lists with each DTensor's own part in its place."""
        for i, p in enumerate(params):
            if not is_plain(p) and not all(is_dtensor(tensors[i]) for tensors in lists):
                raise TypeError(f"{type(self).__name__}: {name_of(self, p)} is a DTensor, its gradient or a state is not: give them its placements")
        return [[t if is_plain(p) else local_part(t, p) for p, t in zip(params, tensors)] for tensors in (params, *lists)]

    def _batches(self, group):
        """(parameters, gradients, states) by (device, whether the master is split, number of this update, whether states are to be made).

        Almost always that is one batch. States are made with the first update, and when SGD's momentum is no longer zero. Models have tens of
        thousands of small parameters: every line of the loop costs a millisecond there.
        """
        batches, names = {}, self._names_in(group)
        is_split, all_states, last, key, batch = self._storage.is_split, self.state, names[-1] if names else "step", None, None
        for p in group["params"]:
            grad = p.grad
            if grad is None:
                continue
            if grad.is_sparse:
                raise sparse_refused(self, p)
            state = all_states[p]
            step = state.get("step", 0)
            step = (step if type(step) is int else int(step)) + 1  # torch keeps it in a tensor
            now = (p.device, is_split and self._storage.splits(p), step, last not in state)
            if now != key:
                key, batch = now, batches.setdefault(now, ([], [], []))
            batch[0].append(p)
            batch[1].append(grad)
            batch[2].append(state)
        return batches

    def _update(self, group, step, is_new, params, grads, states, backend, options):
        raise NotImplementedError(f"{type(self).__name__} has no update")

    def load_state_dict(self, state_dict):
        """As torch.optim.Optimizer, but states keep the dtype they have here: torch would round them to the parameter's.

        States of the optimizer's namesake in torch.optim are taken, too. What is refused changes nothing.
        """
        with all_or_nothing(self):
            super().load_state_dict(state_dict)
            for group in self.param_groups:
                for key, value in self.defaults.items():
                    group.setdefault(key, value)
            self._check_groups()
            for p, group, saved in saved_states(self, state_dict):
                self._restore(p, group, saved)

    def _restore(self, p, group, saved):
        own = self.state[p]
        if "step" in own:
            own["step"] = int(own["step"])  # torch's is a tensor, which goes on counting if the optimizer that it was saved from does
        for theirs, ours in self.torch_names.items():
            if theirs in saved:
                saved = {ours: saved[theirs], **saved}
                del own[theirs]
        for name in self.needed_states:
            if saved.get(name) is None:
                raise ValueError(f"{type(self).__name__}: the saved state of {name_of(self, p)} has no {name!r}: it holds {sorted(saved)}")
        for name in [name for name in own if own[name] is None]:
            del own[name]
        names = [name for name in self.state_names if torch.is_tensor(saved.get(name))]
        try:
            own.update(self._storage.restored(p, self._fresh(p, names), saved))
        except ValueError as error:
            raise ValueError(f"{type(self).__name__}: {name_of(self, p)}: {error}") from None


@contextlib.contextmanager
def all_or_nothing(optimizer):
    """For what adds a group or loads states, which torch keeps in a new dict: if it is refused, the optimizer has the groups and states it had."""
    state, groups, members = optimizer.state, optimizer.param_groups, list(optimizer.param_groups)
    try:
        yield
    except BaseException:
        groups[:] = members
        optimizer.state, optimizer.param_groups = state, groups
        raise


def saved_states(optimizer, state_dict):
    """(parameter, its group, its saved state), where there is one."""
    ids = [i for group in state_dict["param_groups"] for i in group["params"]]
    owners = [(p, group) for group in optimizer.param_groups for p in group["params"]]
    return [(p, group, state_dict["state"][i]) for i, (p, group) in zip(ids, owners) if state_dict["state"].get(i)]


def name_of(optimizer, param):
    """What a message calls a parameter: its name, if the optimizer was given named parameters."""
    for number, group in enumerate(optimizer.param_groups):
        for index, p in enumerate(group["params"]):
            if p is param:
                return f"parameter {group['param_names'][index]!r}" if "param_names" in group else f"parameter {index} of group {number}"
    return "a parameter of no group"


def sparse_refused(optimizer, param):
    return RuntimeError(f"{type(optimizer).__name__}: {name_of(optimizer, param)} has a sparse gradient: make it dense "
                        "(torch.nn.Embedding(sparse=False)) or give the parameter to another optimizer")


def dtensor_refused(optimizer, param):
    return TypeError(f"{type(optimizer).__name__}: {name_of(optimizer, param)} is a DTensor, of which a process holds a part: this update needs the whole "
                     "parameter. Give it plain tensors, or use an optimizer that works element by element (FusedAdam, FusedLion, FusedSGD, "
                     "DeepSpeedCPUAdagrad)")


def opaque_refused(optimizer, param):
    return TypeError(f"{type(optimizer).__name__}: {name_of(optimizer, param)} is {describe(param)}: the kernels write into the memory of dense tensors. "
                     "Give the optimizer those or use torch.optim")


def has_kernels(device):
    """Whether tensors on `device` are updated in C++."""
    return device.type == "cpu" or device.type == "cuda" and lib().OPS_HAVE_CUDA


def _backend(device):
    """The module whose adam_step, lion_step, ... update parameters on `device`: see Note [Where an update runs]."""
    if has_kernels(device):
        return lib()
    from deepspeed.ops import reference
    return reference


def refuse_amsgrad(owner, amsgrad):
    if amsgrad:
        raise RuntimeError(f"{owner} does not support the AMSGrad variant")
