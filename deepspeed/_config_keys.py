# SPDX-License-Identifier: Apache-2.0
"""Names of configuration keys and of optimizers, as constants callers import."""

ADAM_OPTIMIZER = "adam"
ADAMW_OPTIMIZER = "adamw"
LAMB_OPTIMIZER = "lamb"
LION_OPTIMIZER = "lion"
ADAGRAD_OPTIMIZER = "adagrad"
MUON_OPTIMIZER = "muon"
MUADAM_OPTIMIZER = "muadam"
MUADAMW_OPTIMIZER = "muadamw"
MUSGD_OPTIMIZER = "musgd"
DEEPSPEED_OPTIMIZERS = [
    ADAGRAD_OPTIMIZER, ADAM_OPTIMIZER, ADAMW_OPTIMIZER, LAMB_OPTIMIZER, LION_OPTIMIZER, MUON_OPTIMIZER, MUADAM_OPTIMIZER,
    MUADAMW_OPTIMIZER, MUSGD_OPTIMIZER,
]
TORCH_ADAM_PARAM = "torch_adam"
ADAM_W_MODE = "adam_w_mode"
ADAM_W_MODE_DEFAULT = True

# constant -> key; a constant that is not the key in capitals stands with its key
_CAPITALS = """train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps steps_per_print gradient_clipping
communication_data_type prescale_gradients gradient_predivide_factor gradient_allreduce_op zero_allow_untested_optimizer
zero_force_ds_cpu_optimizer dump_state wall_clock_breakdown memory_breakdown dataloader_drop_last disable_allgather
vocabulary_size seq_parallel_communication_data_type use_data_before_expert_parallelism sequence_parallel_size
data_parallel_size optimizer scheduler type checkpoint data_types fp16 zero_optimization torch_autocast pipeline""".split()
_OTHERS = {
    "OPTIMIZER_PARAMS": "params", "SCHEDULER_PARAMS": "params", "MAX_GRAD_NORM": "max_grad_norm", "BFLOAT16": "bf16",
    "BFLOAT16_OLD": "bfloat16", "FP16_ENABLED": "enabled", "BFLOAT16_ENABLED": "enabled", "FP16_LOSS_SCALE": "loss_scale",
    "FP16_INITIAL_SCALE_POWER": "initial_scale_power", "FP16_LOSS_SCALE_WINDOW": "loss_scale_window",
    "FP16_HYSTERESIS": "hysteresis", "FP16_MIN_LOSS_SCALE": "min_loss_scale", "FP16_AUTO_CAST": "auto_cast",
    "CHECKPOINT_TAG_VALIDATION": "tag_validation", "LOAD_UNIVERSAL_CHECKPOINT": "load_universal",
    "USE_NODE_LOCAL_STORAGE_CHECKPOINT": "use_node_local_storage", "GRAD_ACCUM_DTYPE": "grad_accum_dtype",
    "LEGACY_FUSION": "legacy_fusion", "ZERO_OPTIMIZATION_STAGE": "stage",
}
KEYS = {**{key.upper(): key for key in _CAPITALS}, **_OTHERS}
KEYS.update(ROUTE_TRAIN="train", ROUTE_EVAL="eval", ROUTE_PREDICT="predict", ROUTE_ENCODE="encode")
globals().update(KEYS)
