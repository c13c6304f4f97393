# SPDX-License-Identifier: Apache-2.0
"""Configurations of the kinds people already have: each loads with the values it says, or is refused for a stated reason."""
import copy
import json
import pathlib

import pytest

from deepspeed.config import DeepSpeedConfigError, load_config

CONFIGS = pathlib.Path(__file__).parent / "configs"
DEFAULT_BUCKET = 500_000_000

# file -> (ranks, device, expected values)
LOADED = {
    "c01_small_classifier": (2, "cpu", {
        "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 1, "zero_optimization.stage": 0,
        "fp16.enabled": False, "steps_per_print": 2000, "optimizer.type": "Adam",
        "optimizer.params": {"lr": 0.001, "betas": [0.8, 0.999], "eps": 1e-8, "weight_decay": 3e-7},
        "scheduler.params": {"warmup_min_lr": 0, "warmup_max_lr": 0.001, "warmup_num_steps": 1000},
    }),
    "c02_question_answering": (4, "cuda", {
        "gradient_accumulation_steps": 2, "fp16.enabled": True, "fp16.loss_scale": 0, "gradient_clipping": 1.0,
        "optimizer.params": {"lr": 3e-5, "weight_decay": 0.0, "bias_correction": False},
    }),
    "c03_functional_stage2": (2, "cuda", {
        "train_batch_size": 48, "zero_optimization.stage": 2, "zero_optimization.reduce_bucket_size": 7_000_000,
        "zero_optimization.offload_optimizer.device": "cpu", "fp16.initial_scale_power": 32,
        "activation_checkpointing.partition_activations": True,
    }),
    "c05_trainer_zero3": (2, "cuda", {
        "train_batch_size": 4, "zero_optimization.stage": 3, "zero_optimization.offload_param.device": "cpu",
        "zero_optimization.reduce_bucket_size": DEFAULT_BUCKET, "zero_optimization.sub_group_size": 10**9,
        "zero_optimization.stage3_prefetch_bucket_size": 50_000_000, "gradient_clipping": 1.0, "fp16.enabled": False,
        "zero_optimization.gather_16bit_weights_on_model_save": True, "optimizer.type": "AdamW", "optimizer.params": {},
        "scheduler.type": "WarmupDecayLR", "scheduler.params": {},
    }),
    "c06_old_fixture_zero3": (1, "cpu", {
        "zero_optimization.sub_group_size": 10**14, "zero_optimization.reduce_bucket_size": DEFAULT_BUCKET,
        "zero_optimization.prefetch_bucket_size": 0, "zero_optimization.param_persistence_threshold": 0,
        "zero_optimization.stage3_gather_16bit_weights_on_model_save": True,
    }),
    "c08_preset_zero1": (2, "cuda", {
        "train_micro_batch_size_per_gpu": 8, "zero_optimization.stage": 1, "zero_optimization.overlap_comm": True,
        "fp16.enabled": False, "bf16.enabled": False, "fp16.initial_scale_power": 32,
    }),
    "c09_preset_zero3_bf16": (2, "cuda", {
        "train_batch_size": 8, "zero_optimization.stage3_max_live_parameters": 0, "zero_optimization.sub_group_size": 0,
        "zero_optimization.param_persistence_threshold": 100_000, "bf16.enabled": True, "optimizer.type": None,
    }),
    "c10_preset_zero3_all_on_host": (2, "cpu", {
        "train_micro_batch_size_per_gpu": 4, "zero_force_ds_cpu_optimizer": False, "zero_allow_untested_optimizer": True,
        "zero_optimization.offload_optimizer.device": "cpu", "zero_optimization.offload_param.pin_memory": True,
    }),
    "c11_preset_torch_compile": (2, "cuda", {
        "train_batch_size": 4, "zero_optimization.stage": 2, "compile.deepcompile": False,
        "zero_optimization.offload_optimizer.device": "none",
    }),
    "c12_factory_z2": (2, "cuda", {
        "train_batch_size": 4, "zero_optimization.round_robin_gradients": True, "zero_optimization.overlap_comm": True,
        "gradient_clipping": 1.0,
    }),
    "c13_factory_z3": (2, "cuda", {
        "train_batch_size": 32, "gradient_clipping": 0.5, "zero_optimization.overlap_comm": False, "bf16.check_grad_overflow": True,
    }),
    "c15_generated_from_yaml": (2, "cuda", {
        "train_batch_size": 16, "steps_per_print": float("inf"), "zero_optimization.offload_param.nvme_path": None,
        "zero_optimization.reduce_bucket_size": DEFAULT_BUCKET, "bf16.enabled": True,
    }),
    "c07_files": (1, "cuda", {"zero_optimization.offload_optimizer.nvme_path": "/local_nvme", "zero_optimization.offload_param.max_in_cpu": 10**9,
                              "aio.queue_depth": 32}),
    "c18c_super_offload": (2, "cuda", {"zero_optimization.offload_optimizer.device": "cpu"}),
    "c18b_partly_on_host": (2, "cpu", {"zero_optimization.offload_optimizer.ratio": 0.3}),
    "c19_pretraining_stack": (2, "cuda", {
        "gradient_accumulation_steps": 4, "data_types.grad_accum_dtype": "fp32", "bf16.enabled": True,
        "checkpoint.load_universal": True, "checkpoint.use_node_local_storage": True, "fp16.loss_scale_window": 500,
        "pipeline.activation_checkpoint_interval": 1,
    }),
    "c20_long_sequences": (4, "cuda", {
        "train_batch_size": 2, "data_parallel_world_size": 2, "activation_checkpointing.number_checkpoints": None,
    }),
}

# file -> (ranks, device, every part of the message that must be there, what to change to make it load)
REFUSED = {
    "c04_trainer_zero2": (2, "cpu", ["train_batch_size and train_micro_batch_size_per_gpu are both missing"],
                          {"train_micro_batch_size_per_gpu": 1}),
    "c14_factory_tensor_parallel": (2, "cpu", ["tensor_parallel.autotp_size: found 2"], {"tensor_parallel.autotp_size": 1}),
    "c16_chat_actor": (8, "cuda", ["hybrid_engine.enabled"], {"hybrid_engine.enabled": False}),
    "c17_quantised_communication": (2, "cpu", ["zero_optimization.zero_quantized_weights",
                                               "zero_optimization.zero_quantized_gradients"],
                                    {"zero_optimization.zero_quantized_weights": False,
                                     "zero_optimization.zero_quantized_gradients": False}),
    "c18_host_update": (2, "cpu", ["zero_optimization.zenflow"], {"zero_optimization.zenflow": None}),
    "c20b_compiler_passes": (2, "cpu", ["compile.deepcompile"], {"compile.deepcompile": False}),
    "c20c_experts": (2, "cpu", ["expert_parallel.enabled"], {"expert_parallel.enabled": False}),
}


def _at(config, path):
    for name in path.split("."):
        config = getattr(config, name)
    return config


def _path(name):
    return str(CONFIGS / f"{name}.json")


def _changed(raw, changes):
    document = copy.deepcopy(raw)
    for path, value in changes.items():
        *sections, key = path.split(".")
        inner = document
        for section in sections:
            inner = inner[section]
        inner[key] = value
    return document


@pytest.mark.parametrize("name", sorted(LOADED))
def test_loads_with_the_values_it_says(name):
    ranks, device, expected = LOADED[name]
    config = load_config(_path(name), world_size=ranks, device=device)
    assert {path: _at(config, path) for path in expected} == expected


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_is_refused_for_the_stated_reason(name):
    ranks, device, parts, changes = REFUSED[name]
    with pytest.raises(DeepSpeedConfigError) as refusal:
        load_config(_path(name), world_size=ranks, device=device)
    for part in [f"{name}.json", *parts]:
        assert part in str(refusal.value)
    # What the message asks for is enough.
    load_config(_changed(_parse(name), changes), world_size=ranks, device=device)


def _parse(name):
    """The document itself, without checks: parsed as plain JSON (refused files carry no comments)."""
    return json.loads((CONFIGS / f"{name}.json").read_text())


def test_every_file_is_tested():
    assert {path.stem for path in CONFIGS.glob("*.json")} == set(LOADED) | set(REFUSED)
