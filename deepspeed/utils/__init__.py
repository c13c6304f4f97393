# SPDX-License-Identifier: Apache-2.0
"""Import path users have; the code is in other rooms of the package."""
from deepspeed._lazy import attach, names

__getattr__, __dir__, __all__ = attach(__name__, {
    **names("deepspeed.telemetry",
            "logger", "log_dist", "log_dist_once", "set_log_level_from_string", "get_caller_func", "instrument_w_nvtx"),
    **names("deepspeed.device", "OnDevice", "get_numactl_cmd"),
    **names("deepspeed.data", "RepeatingLoader"),
    **names("deepspeed.comm", "is_initialized"),
    **names("deepspeed.parallel", "recursive_getattr", "recursive_setattr"),
    **names("deepspeed.zero.leaf_modules",
            "set_z3_leaf_modules", "unset_z3_leaf_modules", "get_z3_leaf_modules", "z3_leaf_module", "z3_leaf_parameter",
            "set_z3_leaf_module", "set_z3_leaf_modules_by_name", "set_z3_leaf_modules_by_suffix"),
    **names("deepspeed.zero.tensor_access",
            "safe_get_full_fp32_param", "safe_set_full_fp32_param", "safe_get_full_grad", "safe_set_full_grad",
            "safe_get_full_optimizer_state", "safe_set_full_optimizer_state", "safe_get_local_fp32_param",
            "safe_set_local_fp32_param", "safe_get_local_grad", "safe_set_local_grad", "safe_get_local_optimizer_state",
            "safe_set_local_optimizer_state", "safe_update_full_grad_vectorized",
            "get_full_hp_param", "set_full_hp_param", "get_full_hp_grad", "set_full_hp_grad"),
    **names("deepspeed.zero.fragments",
            "tensor_fragment", "fragment_address", "get_hp_fragment_mapping", "map_to_flat_opt_states", "link_hp_params",
            "lazy_init_hp_params_optimizer_state"),
    **{name: f"deepspeed.utils.{name}"
       for name in ("bwc", "comms_logging", "debug", "exceptions", "groups", "init_on_device", "logging", "numa", "nvtx",
                    "timer", "torch", "types", "zero_to_fp32", "zero_to_torch")},
})
