# SPDX-License-Identifier: Apache-2.0
"""Import path users have; the code is in deepspeed.checkpoint.engines."""
from deepspeed._lazy import attach, names

__getattr__, __dir__, __all__ = attach(__name__, names("deepspeed.checkpoint.engines", "CheckpointEngine", "CheckpointCommitInfo"))
