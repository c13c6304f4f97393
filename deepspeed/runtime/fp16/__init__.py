# SPDX-License-Identifier: Apache-2.0
"""Import path users have; the code is in other rooms of the package."""
from deepspeed._lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, {
    **{name: f"deepspeed.runtime.fp16.{name}" for name in ("loss_scaler", "fused_optimizer", "unfused_optimizer",)},
}, {
    **dict.fromkeys(("onebit",), "1-bit optimizers"),
})
