# SPDX-License-Identifier: Apache-2.0
"""Train and run large PyTorch models on one GPU, many, or none, changing only a JSON file.

    engine, optimizer, loader, scheduler = deepspeed.initialize(model=model, model_parameters=model.parameters(), config="ds_config.json")
    loss = engine(batch); engine.backward(loss); engine.step()

Importing this package imports nothing else, torch included: every name is fetched on first access.
"""
from deepspeed._lazy import attach, names

_MODULES = ("accelerator", "checkpoint", "checkpointing", "comm", "config", "constants", "data", "device", "engine",
            "env_report", "git_version_info", "launcher", "module_inject", "monitor", "nvme", "ops", "parallel", "planning",
            "precision", "profiling", "report", "runtime", "schedules", "telemetry", "utils", "zero")

_EXPORTS = {
    **{name: f"deepspeed.{name}" for name in _MODULES},
    # training
    **names("deepspeed.engine", "initialize", "DeepSpeedEngine", "DeepSpeedOptimizerCallable", "DeepSpeedSchedulerCallable"),
    **names("deepspeed.config", "DeepSpeedConfig", "DeepSpeedConfigError", "DeepSpeedConfigWriter"),
    **names("deepspeed.zero.optimizer", "DeepSpeedOptimizer", "ZeROOptimizer"),
    **names("deepspeed.data", "DeepSpeedDataLoader"),
    **names("deepspeed.schedules", "add_tuning_arguments"),
    **names("deepspeed._arguments", "add_config_arguments"),
    **names("deepspeed.engine.muon", "set_optimizer_flags"),
    **names("deepspeed._config_keys", "ADAM_OPTIMIZER", "LAMB_OPTIMIZER", "MUON_OPTIMIZER"),
    **names("deepspeed._compiler", "is_compile_supported"),
    # around it
    **names("deepspeed.checkpoint", "load_pretrained_shards"),
    **names("deepspeed.comm", "init_distributed"),
    "dist": "deepspeed.comm",
    **names("deepspeed.device", "get_accelerator", "OnDevice"),
    **names("deepspeed.telemetry", "logger", "log_dist"),
    # what this is
    **names("deepspeed._version", "__version__"),
    "version": "deepspeed._version:__version__",
    "__version_major__": "deepspeed._version:MAJOR",
    "__version_minor__": "deepspeed._version:MINOR",
    "__version_patch__": "deepspeed._version:PATCH",
    **names("deepspeed.git_version_info", "git_hash", "git_branch", "HAS_TRITON"),
    "__git_hash__": "deepspeed.git_version_info:git_hash",
    "__git_branch__": "deepspeed.git_version_info:git_branch",
}

_NOT_BUILT = {
    **dict.fromkeys(("init_inference", "default_inference_config", "InferenceEngine", "DeepSpeedInferenceConfig", "inference",
                     "model_implementations", "DeepSpeedTransformerLayer", "DeepSpeedTransformerConfig",
                     "replace_transformer_layer", "revert_transformer_layer"), "inference"),
    **dict.fromkeys(("tp_model_init", "set_autotp_mode"), "tensor parallel training"),
    **dict.fromkeys(("pipe", "PipelineModule", "PipelineEngine", "DualPipeVModule", "DualPipeVEngine"), "pipeline parallelism"),
    **dict.fromkeys(("moe",), "mixture-of-experts layers"),
    **dict.fromkeys(("sequence", "domino"), "sequence parallelism"),
    **dict.fromkeys(("DeepSpeedHybridEngine",), "the hybrid engine for RLHF"),
    **dict.fromkeys(("linear",), "the LoRA and quantised linear layers"),
    **dict.fromkeys(("autotuning",), "autotuning"),
    **dict.fromkeys(("io",), "file writers"),
    **dict.fromkeys(("compile",), "compilation passes"),
    **dict.fromkeys(("elasticity", "compression", "nebula"), "elasticity and compression"),
}

__getattr__, __dir__, __all__ = attach(__name__, _EXPORTS, _NOT_BUILT)
