# SPDX-License-Identifier: Apache-2.0
"""Import path users have; the code is in deepspeed.schedules."""
from deepspeed._lazy import attach, names

__getattr__, __dir__, __all__ = attach(__name__, {
    **names("deepspeed.schedules",
            "LRRangeTest", "OneCycle", "WarmupLR", "WarmupDecayLR", "WarmupCosineLR", "VALID_LR_SCHEDULES",
            "add_tuning_arguments", "parse_arguments", "get_config_from_args", "get_lr_from_config", "get_torch_optimizer",
            "update_lr"),
})
