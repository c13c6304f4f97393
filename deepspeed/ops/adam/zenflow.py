# SPDX-License-Identifier: Apache-2.0
"""Names of the optimizers of ZenFlow, which is not built yet."""
from deepspeed.ops.adam.cpu_adam import DeepSpeedCPUAdam
from deepspeed.ops.adam.fused_adam import FusedAdam

_NOT_YET = "{} is not built yet: ZenFlow, which steps the important gradients at once and the others later, will come in a later release. Use {}"


class ZenFlowCPUAdam(DeepSpeedCPUAdam):
    """Adam on the CPU that may run beside the next forward."""

    def __init__(self, *args, overlap_step=False, **kwargs):
        raise NotImplementedError(_NOT_YET.format("ZenFlowCPUAdam", "DeepSpeedCPUAdam"))


class ZenFlowSelectiveAdamW(FusedAdam):
    """AdamW of the chosen columns of each matrix."""

    def __init__(self, *args, offload=False, bucket_size=5e8, **kwargs):
        raise NotImplementedError(_NOT_YET.format(type(self).__name__, "torch.optim.AdamW"))


class ZenFlowSelectiveAdamW_stage3(ZenFlowSelectiveAdamW):
    """The same where parameters are partitioned."""
