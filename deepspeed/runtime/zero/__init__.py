# SPDX-License-Identifier: Apache-2.0
"""Import path users have; the code is in deepspeed.zero."""
from deepspeed._lazy import attach, names

__getattr__, __dir__, __all__ = attach(__name__, {
    **names("deepspeed.zero",
            "Init", "GatheredParameters", "register_external_parameter", "ZeroParamType", "ZeroParamStatus", "TiledLinear",
            "TiledLinearReturnBias", "DeepSpeedZeRoOffload", "DeepSpeedTensorOverride", "unwrap_model_for_generation"),
    **{name: f"deepspeed.runtime.zero.{name}"
       for name in ("config", "leaf_module_config", "linear", "muon", "offload_config", "offload_states", "parameter_offload",
                    "partition_parameters", "partitioned_param_coordinator", "stage3", "stage_1_and_2", "tiling", "utils")},
}, {
    **dict.fromkeys(("MiCS_Init", "mics"), "MiCS sharding"),
})
