# SPDX-License-Identifier: Apache-2.0
"""Import path users have; the code is in deepspeed.checkpointing."""
from deepspeed._lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, {
    **{name: f"deepspeed.runtime.activation_checkpointing.{name}" for name in ("checkpointing", "offload_activations")},
})
