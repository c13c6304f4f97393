# SPDX-License-Identifier: Apache-2.0
import torch

from deepspeed.ops._base import refuse_amsgrad
from deepspeed.ops._storage import add_options_to
from deepspeed.ops.adam.fused_adam import AdamBase
from deepspeed.ops.op_builder import CPUAdamBuilder  # noqa: F401  who asks whether it can be built asks here


class DeepSpeedCPUAdam(AdamBase):
    """Adam or, with `adamw_mode`, AdamW for parameters in host memory (ZeRO-Offload). The numbers are those of torch.optim.

    `fp32_optimizer_states=False` keeps exp_avg and exp_avg_sq in the parameter's dtype.
    """

    fp32_optimizer_states = True
    _settings = (*AdamBase._settings, "adam_w_mode", "fp32_optimizer_states")

    def __init__(self, model_params, lr=1e-3, bias_correction=True, betas=(0.9, 0.999), eps=1e-8, weight_decay=0, amsgrad=False,
                 adamw_mode=True, fp32_optimizer_states=True, **storage_options):
        refuse_amsgrad("DeepSpeedCPUAdam", amsgrad)
        self.adam_w_mode = adamw_mode
        self.fp32_optimizer_states = fp32_optimizer_states
        super().__init__(model_params,
                         dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, bias_correction=bias_correction, amsgrad=amsgrad),
                         fp32_optimizer_states, **storage_options)
        self._snapshots = {}

    def __setstate__(self, state):
        super().__setstate__(state)
        self.__dict__.setdefault("_snapshots", {})  # what a copy has not stepped it cannot undo

    def _subgroup(self, subgroup_id):
        if not 0 <= int(subgroup_id) < len(self.param_groups):
            raise ValueError(f"subgroup_id must lie in [0, {len(self.param_groups)}), got {subgroup_id}")
        return self.param_groups[int(subgroup_id)]

    @torch.no_grad()
    def step_subgroup(self, subgroup_id, closure=None):
        """One update of parameter group number `subgroup_id` alone, which rollback_subgroup can undo; returns the closure's loss, if one is given.

        Before it, the group's parameters that have a gradient and their states are copied (12 bytes an element for float32). The copy is held until
        the group is stepped again, rolled back, or step() is called: an exact undo needs it, as rounding cannot be inverted.
        """
        group, loss = self._subgroup(subgroup_id), None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_groups()
        stepped = [p for p in group["params"] if p.grad is not None]
        self._snapshots[int(subgroup_id)] = [(p, p.detach().clone(), self._copy_of(self.state.get(p, {}))) for p in stepped]
        self._step_group(group)
        return loss

    @torch.no_grad()
    def rollback_subgroup(self, sub_group_id, closure=None):
        """Undoes the last step_subgroup(sub_group_id), to the bit: parameters, states and step counts. `closure` is called afterwards."""
        self._subgroup(sub_group_id)
        if int(sub_group_id) not in self._snapshots:
            raise RuntimeError(f"rollback_subgroup: subgroup {sub_group_id} has no step to undo: only the last step_subgroup of it can be")
        for p, values, state in self._snapshots.pop(int(sub_group_id)):
            p.copy_(values)
            own = self.state[p]
            if not state:
                own.clear()
            for key, value in state.items():
                if torch.is_tensor(own.get(key)) and torch.is_tensor(value):
                    own[key].copy_(value)
                else:
                    own[key] = value
        if closure is None:
            return None
        with torch.enable_grad():
            return closure()

    @staticmethod
    def _copy_of(state):
        return {key: value.clone() if torch.is_tensor(value) else value for key, value in state.items()}

    def step(self, closure=None):
        """One update of every parameter that has a gradient; returns the closure's loss, if one is given."""
        self._snapshots.clear()
        return super().step(closure)


add_options_to(DeepSpeedCPUAdam)
