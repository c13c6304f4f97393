# SPDX-License-Identifier: Apache-2.0
"""What the fused optimizers share: parameter groups, states, and the way from a group to one call of a kernel.

Note [Where an update runs]: parameters on the CPU, and on a GPU if CUDA code was built, are updated in C++ (``deepspeed._C``), all of a
group's parameters in one call. On any other device the same formula runs in torch operations (``deepspeed.ops.reference``).
"""
import torch

from deepspeed._native import lib

# Keys of torch.optim groups that would change the update and that these optimizers do not have.
_REFUSED = ("amsgrad", "maximize", "differentiable")


class FusedOptimizer(torch.optim.Optimizer):
    """Base of the fused optimizers.

    Parameters may be float32, bfloat16 or float16 of any shape; the arithmetic is float32 and what is narrower is rounded once,
    when written. The given parameter-group dicts are kept, not copied, and read anew at every step; keys that are not known are left alone.
    ``state[p]`` holds ``step`` (int) and the tensors named in ``state_names``, float32 unless ``fp32_optimizer_states`` is false.
    """

    state_names = ()

    def __init__(self, params, defaults, fp32_optimizer_states=True):
        self._fp32_states = bool(fp32_optimizer_states)
        super().__init__(params, defaults)

    def add_param_group(self, param_group):
        for key in _REFUSED:
            if isinstance(param_group, dict) and param_group.get(key):
                raise ValueError(f"{type(self).__name__} does not support {key}")
        super().add_param_group(param_group)
        self._check_group(self.param_groups[-1])

    def _check_group(self, group):
        for key in ("lr", "eps", "weight_decay"):
            if key in group and float(group[key]) < 0.0:
                raise ValueError(f"{key} must not be negative, got {group[key]}")
        for beta in group.get("betas", ()):
            if not 0.0 <= float(beta) < 1.0:
                raise ValueError(f"betas must lie in [0, 1), got {group['betas']}")

    def _state_dtype(self, param):
        return torch.float32 if self._fp32_states else param.dtype

    def _state_of(self, param):
        """The parameter's state, made of zeros the first time."""
        state = self.state[param]
        if len(state) == 0:
            state["step"] = 0
            for name in self.state_names:
                state[name] = torch.zeros_like(param, dtype=self._state_dtype(param), memory_format=torch.preserve_format)
        return state

    def _advance(self, state):
        step = state["step"]
        state["step"] = (int(step.item()) if torch.is_tensor(step) else int(step)) + 1
        return state["step"]

    @torch.no_grad()
    def step(self, closure=None):
        """One update of every parameter that has a gradient; returns the closure's loss, if one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for (device, step), params in self._batches(group).items():
                grads = [p.grad for p in params]
                states = [[self.state[p][name] for p in params] for name in self.state_names]
                self._update(group, step, params, grads, states, _backend(device))
        return loss

    def _batches(self, group):
        """Parameters with a gradient by (device, number of this update): almost always one batch."""
        batches = {}
        for p in group["params"]:
            if p.grad is None:
                continue
            if p.grad.is_sparse:
                raise RuntimeError(f"{type(self).__name__} does not support sparse gradients")
            step = self._advance(self._state_of(p))
            batches.setdefault((p.device, step), []).append(p)
        return batches

    def _update(self, group, step, params, grads, states, backend):
        raise NotImplementedError(f"{type(self).__name__} has no update")

    def load_state_dict(self, state_dict):
        """As torch.optim.Optimizer, but float32 states of narrower parameters stay float32 (torch would round them)."""
        super().load_state_dict(state_dict)
        saved_ids = [i for g in state_dict["param_groups"] for i in g["params"]]
        params = [p for g in self.param_groups for p in g["params"]]
        for saved_id, p in zip(saved_ids, params):
            for name, value in state_dict["state"].get(saved_id, {}).items():
                if name in self.state_names and torch.is_tensor(value) and value.is_floating_point():
                    state = torch.empty_like(p, dtype=self._state_dtype(p), memory_format=torch.preserve_format)
                    self.state[p][name] = state.copy_(value)


def _backend(device):
    """The module whose adam_step, lion_step, ... update parameters on `device`: see Note [Where an update runs]."""
    native = lib()
    if device.type == "cpu" or device.type == "cuda" and native.OPS_HAVE_CUDA:
        return native
    from deepspeed.ops import reference
    return reference


def refuse_amsgrad(owner, amsgrad):
    if amsgrad:
        raise RuntimeError(f"{owner} does not support the AMSGrad variant")
