# SPDX-License-Identifier: Apache-2.0
"""Import path users have; the code is in deepspeed.config and deepspeed._config_keys."""
from deepspeed._lazy import attach, names

__getattr__, __dir__, __all__ = attach(__name__, {
    **names("deepspeed.config", "DeepSpeedConfig", "DeepSpeedConfigError", "DeepSpeedConfigWriter", "load_config"),
    **names("deepspeed._config_keys",
            "ADAM_OPTIMIZER", "ADAMW_OPTIMIZER", "LAMB_OPTIMIZER", "LION_OPTIMIZER", "ADAGRAD_OPTIMIZER", "MUON_OPTIMIZER",
            "MUADAM_OPTIMIZER", "MUADAMW_OPTIMIZER", "MUSGD_OPTIMIZER", "DEEPSPEED_OPTIMIZERS", "TORCH_ADAM_PARAM",
            "ADAM_W_MODE", "ADAM_W_MODE_DEFAULT"),
})
