# SPDX-License-Identifier: Apache-2.0
"""Import path users have; the code is in deepspeed.comm."""
from deepspeed._lazy import attach, names

__getattr__, __dir__, __all__ = attach(__name__, {
    **names("deepspeed.comm.mpu",
            "bwc_tensor_model_parallel_rank", "bwc_tensor_model_parallel_world_size", "bwc_tensor_model_parallel_group",
            "bwc_pipeline_parallel_world_size", "bwc_pipeline_parallel_group"),
})
