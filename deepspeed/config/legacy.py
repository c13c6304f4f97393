# SPDX-License-Identifier: Apache-2.0
"""`DeepSpeedConfig`: the same configuration under the flat attribute names that scripts know from DeepSpeed."""
import json
from types import SimpleNamespace

from .facade import Section, load_config
from .world import find_world, rank

# attribute -> key; attributes that are spelt like their top-level key need no row.
_RENAMED = {
    "zero_config": "zero_optimization",
    "zero_optimization_stage": "zero_optimization.stage",
    "float16_config": "fp16",
    "bfloat16_config": "bf16",
    "optimizer_name": "optimizer.type",
    "optimizer_legacy_fusion": "optimizer.legacy_fusion",
    "scheduler_name": "scheduler.type",
    "activation_checkpointing_config": "activation_checkpointing",
    "flops_profiler_config": "flops_profiler",
    "aio_config": "aio",
    "autotuning_config": "autotuning",
    "checkpoint_config": "checkpoint",
    "checkpoint_parallel_write_pipeline": "checkpoint.parallel_write.pipeline_stage",
    "load_universal_checkpoint": "checkpoint.load_universal",
    "use_node_local_storage": "checkpoint.use_node_local_storage",
    "comms_config": "comms_logger",
    "compile_config": "compile",
    "data_efficiency_config": "data_efficiency",
    "data_efficiency_enabled": "data_efficiency.enabled",
    "expert_parallel_config": "expert_parallel",
    "tensor_parallel_config": "tensor_parallel",
    "timers_config": "timers",
    "weight_quantization_config": "weight_quantization",
    "buffer_dtype": "data_types.buffer_dtype",
    "grad_accum_dtype": "data_types.grad_accum_dtype",
    "param_dtype": "data_types.param_dtype",
    "keep_in_fp32_modules": "data_types.keep_in_fp32_modules",
    "torch_autocast_enabled": "torch_autocast.enabled",
    "torch_autocast_dtype": "torch_autocast.dtype",
    "torch_autocast_lower_precision_safe_modules": "torch_autocast.lower_precision_safe_modules",
    "use_data_before_expert_parallel_": "use_data_before_expert_parallelism",
}
# DeepSpeed spells the types it knows itself in small letters.
_BUILT_IN_OPTIMIZERS = frozenset({"adam", "adamw", "adagrad", "lamb", "lion", "muon"})


class DeepSpeedConfig:
    """A read-only view of `Config` under DeepSpeed's attribute names.

    config: dict, path or base64 text. mpu, mesh_device: who knows the data-parallel size; else torch.distributed or WORLD_SIZE.
    `config` is the modern face of the same object.
    """

    def __init__(self, config, mpu=None, mesh_device=None, device="cpu"):
        self.config = load_config(config, mpu=mpu, mesh_device=mesh_device, device=device)
        self.mesh_device = mesh_device
        self.global_rank = rank()
        self.world_size = find_world(mpu, mesh_device).size if mesh_device or mpu else self.config.data_parallel_world_size
        self._param_dict = self.config.raw

    def __getattr__(self, name):
        if name.startswith("_") or name == "config":
            raise AttributeError(name)
        value = self.config
        for part in _RENAMED.get(name, name).split("."):
            value = getattr(value, part)
        return value

    @property
    def optimizer_name(self):
        name = self.config.optimizer.type
        return name.lower() if name is not None and name.lower() in _BUILT_IN_OPTIMIZERS else name

    @property
    def optimizer_params(self):
        return self.config.optimizer.params if self.config.optimizer.type is not None else None

    @property
    def scheduler_params(self):
        return self.config.scheduler.params if self.config.scheduler.type is not None else None

    @property
    def zero_enabled(self):
        return self.config.zero_optimization.stage > 0

    @property
    def checkpoint_tag_validation_enabled(self):
        return self.config.checkpoint.tag_validation != "Ignore"

    @property
    def checkpoint_tag_validation_fail(self):
        return self.config.checkpoint.tag_validation == "Fail"

    @property
    def monitor_config(self):
        return _monitors(self.config)

    def print_user_config(self):
        """Prints what the user wrote."""
        print("  json = " + json.dumps(self.config.raw, sort_keys=True, indent=4, default=str))

    def print(self, name):
        """Prints every resolved key under the heading `name`, then what the user wrote."""
        print(f"{name}:")
        for key, value in sorted(self.config.items()):
            print(f"  {key} = {value.to_dict() if isinstance(value, Section) else value}")
        self.print_user_config()


def _monitors(config):
    monitors = {name: getattr(config, name) for name in ("tensorboard", "comet", "wandb", "csv_monitor")}
    return SimpleNamespace(**monitors, enabled=any(monitor.enabled for monitor in monitors.values()))


def get_monitor_config(param_dict):
    """The monitors' sections of a configuration given as a dict, checked, as MonitorMaster takes them."""
    return _monitors(load_config(param_dict, world_size=1, batch_required=False))


class DeepSpeedConfigWriter:
    """Gathers settings and writes them as JSON."""

    def __init__(self, data=None):
        self.data = {} if data is None else data

    def add_config(self, key, value):
        self.data[key] = value

    def load_config(self, filename):
        self.data = load_config(filename, world_size=1, batch_required=False).raw

    def write_config(self, filename):
        with open(filename, "w", encoding="utf-8") as out:
            json.dump(self.data, out, indent=2)
