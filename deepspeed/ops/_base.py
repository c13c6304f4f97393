# SPDX-License-Identifier: Apache-2.0
"""What the fused optimizers share: parameter groups, states, and the way from a group to one call of a kernel.

Note [Where an update runs]: parameters on the CPU, and on a GPU if CUDA code was built, are updated in C++ (``deepspeed._C``), all of a
group's parameters in one call. On any other device the same formula runs in torch operations (``deepspeed.ops.reference``).
"""
import torch

from deepspeed._native import lib
from deepspeed.ops._storage import Storage

# Keys of torch.optim groups that would change the update and that these optimizers do not have.
_REFUSED = ("amsgrad", "maximize", "differentiable")


class FusedOptimizer(torch.optim.Optimizer):
    """Base of the fused optimizers.

    Parameters may be float32, bfloat16 or float16 of any shape; the arithmetic is float32 and what is narrower is rounded once,
    when written. The given parameter-group dicts are kept, not copied, and read anew at every step; keys that are not known are left alone.
    ``state[p]`` holds ``step`` (int) and the tensors named in ``state_names``, float32 unless ``fp32_optimizer_states`` is false or the
    options of ``deepspeed.ops._storage`` say otherwise.
    """

    state_names = ()
    unsigned_states = ("exp_avg_sq",)  # those that are never negative
    _settings = ("_storage",)  # attributes that copies and pickles carry; torch carries defaults, state and param_groups alone

    def __init__(self, params, defaults, fp32_optimizer_states=True, **storage_options):
        self._storage = Storage(type(self).__name__, fp32_optimizer_states, **storage_options)
        self._numbers = {}
        super().__init__(params, defaults)

    def __getstate__(self):
        return {**super().__getstate__(), **{name: self.__dict__[name] for name in self._settings if name in self.__dict__}}

    def __setstate__(self, state):
        """Also of pickles that carry no settings, and what torch's load_state_dict calls with state and groups alone."""
        super().__setstate__(state)
        if "_storage" not in self.__dict__:
            self._storage = Storage.of_states(type(self).__name__, self.state, self.state_names)
        self._numbers = {p: i for i, p in enumerate(p for group in self.param_groups for p in group["params"])}

    @property
    def storage(self):
        """How master values and states are kept."""
        return self._storage

    def add_param_group(self, param_group):
        for key in _REFUSED:
            if isinstance(param_group, dict) and param_group.get(key):
                raise ValueError(f"{type(self).__name__} does not support {key}")
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        self._check_group(group)
        for p in group["params"]:
            self._numbers[p] = len(self._numbers)
            if self._storage.is_split and p.dtype == torch.float16:
                raise ValueError(f"{type(self).__name__}: master='split' needs bfloat16 parameters: float16 is no upper half of a float32")

    def _check_group(self, group):
        for key in ("lr", "eps", "weight_decay"):
            if key not in group:
                continue
            if isinstance(group[key], (tuple, list, str)):
                raise TypeError(f"{type(self).__name__}: {key} must be a number, got {group[key]!r}. If these parameter groups were made for another "
                                "optimizer (Accelerate turns any into DeepSpeedCPUAdam when zero_optimization.offload_optimizer is on), use "
                                "AdamW, or set \"zero_force_ds_cpu_optimizer\": false in the configuration")
            if float(group[key]) < 0.0:
                raise ValueError(f"{key} must not be negative, got {group[key]}")
        for beta in group.get("betas", ()):
            if not 0.0 <= float(beta) < 1.0:
                raise ValueError(f"betas must lie in [0, 1), got {group['betas']}")

    def _names_in(self, group):
        """The states that a group's parameters have."""
        return self.state_names

    def _state_of(self, param, names):
        """The parameter's state, made of zeros the first time."""
        state = self.state[param]
        if len(state) == 0:
            state["step"] = 0
            state.update(self._storage.fresh(param, names, self.unsigned_states))
        elif names and names[-1] not in state:  # SGD whose momentum was zero until now
            state.update(self._storage.fresh(param, names, self.unsigned_states))
        return state

    @torch.no_grad()
    def step(self, closure=None):
        """One update of every parameter that has a gradient; returns the closure's loss, if one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._step_group(group)
        return loss

    def _step_group(self, group):
        names = self._names_in(group)
        for (_, _, step), (params, grads, states) in self._batches(group).items():
            device = params[0].device
            backend = _backend(device)
            options = self._storage.call_options(params, states, names, step, self._numbers)
            if options and backend is not lib():
                raise ValueError(f"{type(self).__name__}: {', '.join(options)}: no kernel for parameters on {device}")
            self._update(group, step, params, grads, [[s[name] for s in states] for name in names], backend, options)

    def _batches(self, group):
        """(parameters, gradients, states) by (device, whether the master is split, number of this update): almost always one batch.

        Models have tens of thousands of small parameters: every line of the loop costs a millisecond there.
        """
        batches, names = {}, self._names_in(group)
        is_split, state_of, key, batch = self._storage.is_split, self._state_of, None, None
        for p in group["params"]:
            grad = p.grad
            if grad is None:
                continue
            if grad.is_sparse:
                raise RuntimeError(f"{type(self).__name__} does not support sparse gradients")
            state = state_of(p, names)
            step = state["step"]
            step = (step if type(step) is int else int(step)) + 1  # torch keeps it in a tensor
            state["step"] = step
            now = (p.device, is_split and self._storage.splits(p), step)
            if now != key:
                key, batch = now, batches.setdefault(now, ([], [], []))
            batch[0].append(p)
            batch[1].append(grad)
            batch[2].append(state)
        return batches

    def _update(self, group, step, params, grads, states, backend, options):
        raise NotImplementedError(f"{type(self).__name__} has no update")

    def load_state_dict(self, state_dict):
        """As torch.optim.Optimizer, but states keep the dtype they have here: torch would round them to the parameter's."""
        super().load_state_dict(state_dict)
        saved_ids = [i for g in state_dict["param_groups"] for i in g["params"]]
        owners = [(p, g) for g in self.param_groups for p in g["params"]]
        for saved_id, (p, group) in zip(saved_ids, owners):
            saved = state_dict["state"].get(saved_id, {})
            if saved:
                names = [name for name in self._names_in(group) if torch.is_tensor(saved.get(name))]
                self.state[p].update(self._storage.restored(p, self._storage.fresh(p, names, self.unsigned_states), saved))


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
