# SPDX-License-Identifier: Apache-2.0
"""Import path users have; the code is in deepspeed.checkpoint.engines."""
from deepspeed._lazy import attach, names

__getattr__, __dir__, __all__ = attach(__name__, {
    **names("deepspeed.checkpoint.engines", "TorchCheckpointEngine", "CheckpointCommitInfo"),
    **{name: f"deepspeed.runtime.checkpoint_engine.{name}" for name in ("checkpoint_engine", "torch_checkpoint_engine")},
}, {
    **dict.fromkeys(("FastCheckpointEngine", "DecoupledCheckpointEngine", "DataStatesCheckpointEngine", "create_checkpoint_engine",
                     "fast_checkpoint_engine", "decoupled_checkpoint_engine", "datastates_checkpoint_engine"),
                    "checkpoint engines other than torch's (save_checkpoint writes in the background when checkpoint.writer.decoupled is set)"),
})
