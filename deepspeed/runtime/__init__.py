# SPDX-License-Identifier: Apache-2.0
"""Import path users have; the code is in other rooms of the package."""
from deepspeed._lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, {
    **{name: f"deepspeed.runtime.{name}"
       for name in ("activation_checkpointing", "base_optimizer", "bf16_optimizer", "checkpoint_engine", "compiler", "config", "config_utils",
                    "constants", "data_pipeline", "dataloader", "engine", "fp16", "lr_schedules", "utils", "zero")},
}, {
    **dict.fromkeys(("pipe",), "pipeline parallelism"),
    **dict.fromkeys(("sequence_parallel", "domino", "chunked_cross_entropy"), "sequence parallelism"),
    **dict.fromkeys(("hybrid_engine", "rollout"), "the hybrid engine for RLHF"),
    **dict.fromkeys(("tensor_parallel",), "tensor parallel training"),
    **dict.fromkeys(("comm",), "1-bit communication"),
    **dict.fromkeys(("zenflow", "superoffload"), "ZenFlow and SuperOffload"),
    **dict.fromkeys(("swap_tensor",), "file offload"),
    **dict.fromkeys(("torch_autocast",), "the helpers that inspect torch_autocast"),
})
