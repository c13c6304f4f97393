# SPDX-License-Identifier: Apache-2.0
"""Import path users have; the code is in deepspeed.ops.muon."""
from deepspeed._lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, {
    **{name: f"deepspeed.runtime.zero.muon.{name}" for name in ("muon_optimizer", "original_muon",)},
})
