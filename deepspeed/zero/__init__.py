# SPDX-License-Identifier: Apache-2.0
"""ZeRO: parameters, gradients and optimizer state cut over the ranks."""
from deepspeed._lazy import attach, names

__getattr__, __dir__, __all__ = attach(__name__, {
    **names("deepspeed.zero.init", "Init", "shutdown_init_context", "restore_init_context"),
    **names("deepspeed.zero.gathered", "GatheredParameters"),
    **names("deepspeed.zero.external", "register_external_parameter", "unregister_external_parameter"),
    **names("deepspeed.zero.status", "ZeroParamStatus", "ZeroParamType", "DeepSpeedTensorOverride"),
    **names("deepspeed.zero.offload", "DeepSpeedZeRoOffload", "PartitionedParameterCoordinator"),
    **names("deepspeed.zero.generation", "unwrap_model_for_generation"),
    **names("deepspeed.zero.ordered_dict", "ZeROOrderedDict"),
    **names("deepspeed.zero.optimizer_kinds", "DeepSpeedZeroOptimizer", "DeepSpeedZeroOptimizer_Stage3"),
    **names("deepspeed.zero.devices", "get_state_devices"),
    **names("deepspeed.zero.tiling", "TiledLinear", "TiledLinearReturnBias"),
})
