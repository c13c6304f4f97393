# SPDX-License-Identifier: Apache-2.0
"""Activation checkpointing: throw activations away in forward, compute them again in backward."""
from deepspeed._lazy import attach, names

__getattr__, __dir__, __all__ = attach(__name__, {
    **names("deepspeed.checkpointing.configuration", "configure", "is_configured", "reset", "set_num_layers",
            "partition_activations_in_checkpoint"),
    **names("deepspeed.checkpointing.recompute", "checkpoint", "non_reentrant_checkpoint", "CheckpointFunction"),
    **names("deepspeed.checkpointing.rng", "CudaRNGStatesTracker", "get_cuda_rng_tracker", "model_parallel_cuda_manual_seed",
            "model_parallel_reconfigure_tp_seed"),
})
