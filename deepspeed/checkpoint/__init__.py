# SPDX-License-Identifier: Apache-2.0
"""Saving and loading."""
from deepspeed._lazy import attach, names

__getattr__, __dir__, __all__ = attach(__name__, {
    **names("deepspeed.checkpoint.clone", "clone_tensors_for_torch_save"),
    **names("deepspeed.checkpoint.directories", "ensure_directory_exists"),
    **names("deepspeed.checkpoint.manifest", "Checkpoint"),
    **names("deepspeed.checkpoint.restricted_pickle", "allow_classes"),
    **names("deepspeed.checkpoint.source", "CheckpointError", "CheckpointSource", "TensorInfo"),
    **names("deepspeed.checkpoint.location", "open_checkpoint"),
    **names("deepspeed.checkpoint.pretrained", "load_pretrained_shards"),
    **{name: f"deepspeed.checkpoint.{name}" for name in ("constants", "ds_to_universal", "utils")},
}, dict.fromkeys(("DeepSpeedCheckpoint",), "reading checkpoints of model-parallel ranks"))
