# SPDX-License-Identifier: Apache-2.0
"""Import path users have; the code is in other rooms of the package."""
from deepspeed._lazy import attach, names

__getattr__, __dir__, __all__ = attach(__name__, {
    **names("deepspeed.telemetry", "see_memory_usage", "memory_status", "get_ma_status", "empty_cache"),
    **names("deepspeed.telemetry.text", "call_to_str"),
    **names("deepspeed.precision.norms",
            "clip_grad_norm_", "get_global_norm", "get_grad_norm", "get_weight_norm", "get_global_norm_of_tensors",
            "clip_tensors_by_global_norm", "is_model_parallel_parameter"),
    **names("deepspeed.precision.overflow", "CheckOverflow"),
    **names("deepspeed.device", "move_to_device", "copy_to_device", "set_random_seed", "get_accelerator"),
    **names("deepspeed.parallel", "partition_uniform", "partition_balanced", "prefix_sum_inc", "PartitionedTensor"),
    **names("deepspeed.checkpoint", "ensure_directory_exists"),
    **names("deepspeed._torch_version", "required_torch_version"),
    **names("deepspeed.parallel.agreement", "get_only_unique_item"),
    **names("deepspeed.precision.dummy_optimizer", "DummyOptim"),
    **names("deepspeed.comm.mpu",
            "bwc_tensor_model_parallel_rank", "bwc_tensor_model_parallel_world_size", "bwc_tensor_model_parallel_group",
            "bwc_pipeline_parallel_world_size", "bwc_pipeline_parallel_group"),
})
