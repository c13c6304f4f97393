# SPDX-License-Identifier: Apache-2.0
"""Import path users have; the code is in deepspeed.zero."""
from deepspeed._lazy import attach, names

__getattr__, __dir__, __all__ = attach(__name__, {
    **names("deepspeed.zero.optimizer_kinds", "DeepSpeedZeroOptimizer"),
    **names("deepspeed.zero.estimates",
            "estimate_zero2_model_states_mem_needs", "estimate_zero2_model_states_mem_needs_all_live",
            "estimate_zero2_model_states_mem_needs_all_cold"),
})
