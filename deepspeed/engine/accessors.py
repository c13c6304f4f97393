# SPDX-License-Identifier: Apache-2.0
"""The engine's read-only questions about its configuration, under the names callers use."""
import dataclasses

import torch
import torch.distributed as dist

from deepspeed.engine.inputs import autocast_dtype


def _zero(name):
    def read(self):
        return getattr(self._config.zero_optimization, name)
    read.__doc__ = f"zero_optimization.{name}"
    return read


def _top(name):
    def read(self):
        return getattr(self._config, name)
    read.__doc__ = f"{name} of the configuration"
    return read


class ConfigAccessors:

    # ---- state of training

    def get_lr(self):
        """Learning rate of each param group."""
        return [group["lr"] for group in self.basic_optimizer.param_groups] if self.basic_optimizer is not None else []

    def get_type(self):
        return [group.get("type") for group in self.basic_optimizer.param_groups] if self.basic_optimizer is not None else []

    def get_mom(self):
        """Momentum (or betas) of each param group."""
        groups = self.basic_optimizer.param_groups if self.basic_optimizer is not None else []
        return [group["betas"] if "betas" in group else group.get("momentum") for group in groups]

    # ---- precision

    def fp16_enabled(self):
        return self._config.fp16.enabled

    def bfloat16_enabled(self):
        return self._config.bf16.enabled

    def fp16_auto_cast(self):
        return self._config.fp16.auto_cast

    def fp16_master_weights_and_gradients(self):
        return self._config.fp16.fp16_master_weights_and_grads

    def bf16_master_weights_and_gradients(self):
        return self._config.bf16.bf16_master_weights_and_grads

    def loss_scale(self):
        """The current factor on the loss (a number; 1 when there is no scaling)."""
        return getattr(self.optimizer, "loss_scale", 1.0)

    def dynamic_loss_scale(self):
        return self._config.fp16.enabled and self._config.fp16.loss_scale == 0

    def initial_dynamic_scale(self):
        return 2**self._config.fp16.initial_scale_power

    def dynamic_loss_scale_args(self):
        fp16 = self._config.fp16
        return {"init_scale": 2**fp16.initial_scale_power, "scale_window": fp16.loss_scale_window, "min_scale": fp16.min_loss_scale,
                "delayed_shift": fp16.hysteresis, "consecutive_hysteresis": fp16.consecutive_hysteresis}

    def get_data_types(self):
        """(dtype of the model, dtype in which gradients are accumulated)."""
        return self._layout.compute_dtype or torch.float32, torch.float32

    def torch_autocast_enabled(self):
        return self._config.torch_autocast.enabled

    def torch_autocast_dtype(self):
        return autocast_dtype(self._config.torch_autocast)

    @property
    def communication_data_type(self):
        """dtype of gradients while they are reduced. May be set between steps, on all ranks alike; None: that of the parameters."""
        return self._layout.comm_dtype or self._layout.compute_dtype or torch.float32

    @communication_data_type.setter
    def communication_data_type(self, dtype):
        if self._managed is not None and self._managed.reducer is not None:
            self._managed.reducer.set_comm_dtype(dtype)
        self._layout = dataclasses.replace(self._layout, comm_dtype=dtype)

    @property
    def enable_backward_allreduce(self):
        """Whether backward reduces gradients. False: allreduce_gradients() does, or step() at the latest; stages 2 and 3, which never
        hold whole gradients, reduce as always."""
        return self._backward_allreduce

    @enable_backward_allreduce.setter
    def enable_backward_allreduce(self, on):
        self._backward_allreduce = bool(on)
        managed = self.__dict__.get("_managed")
        if managed is not None and managed.reducer is not None and self._layout.defer_in_no_sync:
            managed.reducer.set_deferred(not on)

    # ---- optimizer and scheduler sections

    def optimizer_name(self):
        return type(self.client_optimizer).__name__ if self.client_optimizer is not None else self._config.optimizer.type

    def optimizer_params(self):
        return self._config.optimizer.params

    def optimizer_legacy_fusion(self):
        return self._config.optimizer.legacy_fusion

    def scheduler_name(self):
        return self._config.scheduler.type

    def scheduler_params(self):
        return self._config.scheduler.params

    # ---- zero

    def zero_optimization(self):
        return self._config.zero_optimization.stage > 0

    def zero_optimization_stage(self):
        return int(self._config.zero_optimization.stage)

    def zero_optimization_partition_gradients(self):
        return self.zero_optimization_stage() >= 2

    def zero_optimization_partition_weights(self):
        return self.zero_optimization_stage() >= 3

    def zero_offload_optimizer(self):
        section = self._config.zero_optimization.offload_optimizer
        return section if self._config.is_set("zero_optimization.offload_optimizer") else None

    def zero_offload_param(self):
        section = self._config.zero_optimization.offload_param
        return section if self._config.is_set("zero_optimization.offload_param") else None

    def zero_cpu_offload(self):
        return self._config.zero_optimization.offload_optimizer.device == "cpu"

    def zero_use_cpu_optimizer(self):
        return self._config.zero_optimization.offload_optimizer.device in ("cpu", "nvme")

    def zero_has_nvme_offload(self):
        zero = self._config.zero_optimization
        return "nvme" in (zero.offload_optimizer.device, zero.offload_param.device)

    zero_reduce_bucket_size = _zero("reduce_bucket_size")
    zero_reduce_scatter = _zero("reduce_scatter")
    zero_overlap_comm = _zero("overlap_comm")
    zero_contiguous_gradients = _zero("contiguous_gradients")
    zero_allgather_partitions = _zero("allgather_partitions")
    zero_allgather_bucket_size = _zero("allgather_bucket_size")
    zero_multi_rank_bucket_allreduce = _zero("use_multi_rank_bucket_allreduce")
    zero_sub_group_size = _zero("sub_group_size")
    zero_prefetch_bucket_size = _zero("prefetch_bucket_size")
    zero_param_persistence_threshold = _zero("param_persistence_threshold")
    zero_model_persistence_threshold = _zero("model_persistence_threshold")
    zero_max_live_parameters = _zero("max_live_parameters")
    zero_max_reuse_distance = _zero("max_reuse_distance")
    zero_module_granularity_threshold = _zero("module_granularity_threshold")
    zero_ignore_unused_parameters = _zero("ignore_unused_parameters")
    zero_elastic_checkpoint = _zero("elastic_checkpoint")
    zero_load_from_fp32_weights = _zero("load_from_fp32_weights")
    zero_legacy_stage1 = _zero("legacy_stage1")
    zero_round_robin_gradients = _zero("round_robin_gradients")
    zero_hpz_partition_size = _zero("zero_hpz_partition_size")
    zero_quantized_weights = _zero("zero_quantized_weights")
    zero_quantized_nontrainable_weights = _zero("zero_quantized_nontrainable_weights")
    zero_quantized_gradients = _zero("zero_quantized_gradients")
    zero_log_trace_cache_warnings = _zero("log_trace_cache_warnings")
    zero_allgather_sequential = _zero("allgather_sequential")

    # ---- top level

    gradient_clipping = _top("gradient_clipping")
    steps_per_print = _top("steps_per_print")
    memory_breakdown = _top("memory_breakdown")
    log_level = _top("log_level")
    gradient_predivide_factor = _top("gradient_predivide_factor")
    prescale_gradients = _top("prescale_gradients")
    dataloader_drop_last = _top("dataloader_drop_last")
    managed_gradient_accumulation = _top("managed_gradient_accumulation")
    zero_allow_untested_optimizer = _top("zero_allow_untested_optimizer")
    zero_force_ds_cpu_optimizer = _top("zero_force_ds_cpu_optimizer")
    sparse_gradients_enabled = _top("sparse_gradients")

    def postscale_gradients(self):
        return not self._config.prescale_gradients

    def swap_tensor_config(self):
        return self._config.aio

    def aio_config(self):
        return self._config.aio

    # ---- groups

    def get_data_parallel_rank(self):
        return dist.get_rank(self.data_parallel_group)

    def get_model_parallel_rank(self):
        return self.mpu.get_model_parallel_rank() if hasattr(self.mpu, "get_model_parallel_rank") else 0

    get_tensor_parallel_rank = get_model_parallel_rank

    def get_sequence_parallel_group(self):
        """The group over which sequences are cut; None when they are not."""
        from deepspeed.comm import groups
        try:
            return groups._get_sequence_parallel_group()
        except KeyError:
            return None

    def all_gather_scalar(self, value, dp_group=None):
        """The value of every data-parallel rank, as a list of one-element tensors."""
        mine = torch.as_tensor(value, device=self.device).reshape(1)
        group = dp_group or self.data_parallel_group
        found = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
        dist.all_gather(found, mine, group=group)
        return found
