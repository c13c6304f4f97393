# SPDX-License-Identifier: Apache-2.0
from deepspeed.ops._base import FusedOptimizer, refuse_amsgrad
from deepspeed.ops._storage import add_options_to


class DeepSpeedCPUAdagrad(FusedOptimizer):
    """Adagrad (Duchi et al. 2011) with the numbers of torch.optim.Adagrad. `adamw_mode` is accepted and means nothing."""

    state_names = needed_states = ("exp_avg_sq",)
    torch_names = {"sum": "exp_avg_sq"}
    fp32_optimizer_states = True
    _settings = (*FusedOptimizer._settings, "fp32_optimizer_states")

    def __init__(self, model_params, lr=1e-2, eps=1e-10, weight_decay=0, amsgrad=False, fp32_optimizer_states=True, adamw_mode=None,
                 **storage_options):
        refuse_amsgrad("DeepSpeedCPUAdagrad", amsgrad)
        self.fp32_optimizer_states = fp32_optimizer_states
        super().__init__(model_params, dict(lr=lr, eps=eps, weight_decay=weight_decay, amsgrad=amsgrad), fp32_optimizer_states,
                         **storage_options)

    def _check_group(self, group):
        super()._check_group(group)
        for key in ("lr_decay", "initial_accumulator_value"):
            if group.get(key):
                raise ValueError(f"{key} is not supported")

    def _update(self, group, step, is_new, params, grads, states, backend, options):
        backend.adagrad_step(params, grads, *states, lr=float(group["lr"]), eps=float(group["eps"]),
                             weight_decay=float(group["weight_decay"]), **options)


add_options_to(DeepSpeedCPUAdagrad)
