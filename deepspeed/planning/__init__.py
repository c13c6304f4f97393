# SPDX-License-Identifier: Apache-2.0
"""How much memory and traffic a training run will need, before there is one. `deepspeed plan`; imports no torch by itself.

    from deepspeed.planning import plan
    for choice in plan("ds_config.json", params=7e9, gpus=64).choices:
        print(choice.name, choice.device_bytes / 2**30)
"""
from deepspeed._lazy import attach, names

__getattr__, __dir__, __all__ = attach(__name__, {
    **names("deepspeed.planning.plan", "plan", "Plan", "Choice", "Room"),
    **names("deepspeed.planning.shape", "Shape"),
})
