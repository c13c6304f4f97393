# SPDX-License-Identifier: Apache-2.0
"""The one place that reads the ZeRO stage: from here on there are layouts."""
from dataclasses import dataclass


def divided_at(stage):
    """What a stage divides: (parameters exist in slices between uses, each rank updates its own slices only)."""
    return stage == 3, stage >= 1


def persistent_numel(zero):
    """Units up to this size stay gathered at stage 3."""
    return min(zero.param_persistence_threshold, zero.model_persistence_threshold)


def _dtype(name):
    import torch  # not above: planning reads the layout of a configuration without it
    return {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[name]


@dataclass(frozen=True)
class Layout:
    shard_params: bool        # parameters exist in slices between uses
    partial_step: bool        # each rank updates its own slices only
    defer_in_no_sync: bool    # no_sync() may keep whole unreduced gradients
    compute_dtype: object     # what floating-point parameters become; None keeps each one's own
    comm_dtype: object        # dtype of gradients on their way; None: the parameter's
    pre_scale: float          # on a gradient before the reduction
    post_scale: float         # on the sum, without gradient accumulation
    persistent_numel: int     # units up to this size stay gathered
    shard_size: int           # ranks a flat is cut over (hybrid sharding); 0: all


def layout_of(config, world_size):
    zero = config.zero_optimization
    stage = int(zero.stage)
    shard_params, partial_step = divided_at(stage)
    compute = _dtype("bf16") if config.bf16.enabled else _dtype("fp16") if config.fp16.enabled else None
    comm = config.communication_data_type
    total = 1.0 if str(config.gradient_allreduce_op).lower() == "sum" else 1.0 / world_size
    pre = 1.0
    if config.prescale_gradients:
        pre = total
    elif config.gradient_predivide_factor != 1.0:
        pre = 1.0 / config.gradient_predivide_factor
    return Layout(shard_params=shard_params, partial_step=partial_step, defer_in_no_sync=stage <= 1, compute_dtype=compute,
                  comm_dtype=_dtype(comm.lower()) if comm else None, pre_scale=pre, post_scale=total / pre,
                  persistent_numel=persistent_numel(zero),
                  shard_size=zero.zero_hpz_partition_size if stage == 3 else 0)
