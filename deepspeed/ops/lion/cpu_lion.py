# SPDX-License-Identifier: Apache-2.0
from deepspeed.ops._storage import add_options_to
from deepspeed.ops.lion.fused_lion import LionBase


class DeepSpeedCPULion(LionBase):
    """Lion for parameters in host memory. `adamw_mode` is accepted and means nothing: Lion's weight decay is always decoupled."""

    fp32_optimizer_states = True
    _settings = (*LionBase._settings, "fp32_optimizer_states")

    def __init__(self, model_params, lr=1e-3, betas=(0.9, 0.999), weight_decay=0, fp32_optimizer_states=True, adamw_mode=None, **storage_options):
        self.fp32_optimizer_states = fp32_optimizer_states
        super().__init__(model_params, dict(lr=lr, betas=betas, weight_decay=weight_decay), fp32_optimizer_states, **storage_options)


add_options_to(DeepSpeedCPULion)
