# SPDX-License-Identifier: Apache-2.0
from deepspeed.ops._base import refuse_amsgrad
from deepspeed.ops.adam.fused_adam import AdamBase


class DeepSpeedCPUAdam(AdamBase):
    """Adam or, with `adamw_mode`, AdamW for parameters in host memory (ZeRO-Offload). The numbers are those of torch.optim.

    `fp32_optimizer_states=False` keeps exp_avg and exp_avg_sq in the parameter's dtype.
    """

    def __init__(self, model_params, lr=1e-3, bias_correction=True, betas=(0.9, 0.999), eps=1e-8, weight_decay=0, amsgrad=False,
                 adamw_mode=True, fp32_optimizer_states=True):
        refuse_amsgrad("DeepSpeedCPUAdam", amsgrad)
        self.adam_w_mode = adamw_mode
        self.fp32_optimizer_states = fp32_optimizer_states
        super().__init__(model_params,
                         dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, bias_correction=bias_correction, amsgrad=amsgrad),
                         fp32_optimizer_states)
