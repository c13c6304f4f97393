# SPDX-License-Identifier: Apache-2.0
"""Import path users have; the code is in deepspeed.zero."""
from deepspeed._lazy import attach, names

__getattr__, __dir__, __all__ = attach(__name__, {
    **names("deepspeed.zero.fragments",
            "tensor_fragment", "fragment_address", "get_hp_fragment_mapping", "map_to_flat_opt_states", "link_hp_params",
            "lazy_init_hp_params_optimizer_state"),
    **names("deepspeed.zero.tensor_access",
            "safe_get_full_fp32_param", "safe_set_full_fp32_param", "safe_get_full_grad", "safe_set_full_grad",
            "safe_get_full_optimizer_state", "safe_set_full_optimizer_state", "safe_get_local_fp32_param",
            "safe_set_local_fp32_param", "safe_get_local_grad", "safe_set_local_grad", "safe_get_local_optimizer_state",
            "safe_set_local_optimizer_state", "safe_update_full_grad_vectorized",
            "get_full_hp_param", "set_full_hp_param", "get_full_hp_grad", "set_full_hp_grad"),
})
