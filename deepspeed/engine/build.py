# SPDX-License-Identifier: Apache-2.0
"""Puts a model under management: plan, store, reducer, optimizer."""
import torch

from deepspeed._native import core, lib
from deepspeed.device.host_memory import trim_heap
from deepspeed.precision.loss_scaler import scaler_for
from deepspeed.telemetry import logger
from deepspeed.zero.managed import ManagedModel, home_of
from deepspeed.zero.optimizer import ShardedOptimizer
from deepspeed.zero.step_options import StepOptions
from deepspeed.zero.tiers import tiers_of
from deepspeed.zero.transports import open_transports
from deepspeed.zero.units import plan_model


def _target_dtype(layout):
    def dtype_of(parameter):
        if layout.compute_dtype is not None and parameter.is_floating_point():
            return layout.compute_dtype
        return parameter.dtype
    return dtype_of


def _mark_configured_leaves(model, section):
    from deepspeed.zero.leaf_modules import set_z3_leaf_modules_by_name, set_z3_leaf_modules_by_suffix
    for mark, wanted in ((set_z3_leaf_modules_by_name, section.names), (set_z3_leaf_modules_by_suffix, section.name_suffixes)):
        if wanted:
            _, missing = mark(model, list(wanted), raise_if_not_found=False)
            for name in missing:
                logger.warning(f"zero_optimization.leaf_module: the model has no module {name!r}")


def _move_rest(model, device):
    """Buffers, and parameters that are not managed (empty ones), to the device."""
    for buffer_owner in model.modules():
        for name, buffer in buffer_owner._buffers.items():
            if buffer is not None and buffer.device != device and not buffer.is_meta:
                buffer_owner._buffers[name] = buffer.to(device)


def manage(model, config, layout, device, group, trained):
    """Collective. The model's parameters in a store laid out as asked. `trained`: ids of the parameters that are stepped."""
    zero = config.zero_optimization
    _mark_configured_leaves(model, zero.leaf_module)
    plan = plan_model(model, zero.reduce_bucket_size, zero.prefetch_bucket_size, tuple(zero.leaf_module.classes))
    transports = open_transports(device, group, layout.shard_size or None)
    managed = ManagedModel(transports, device, layout.shard_params, full_master=not layout.partial_step,
                           tiers=tiers_of(config, device, bool(trained)), split_master=config.bf16.split_master)
    dtype_of = _target_dtype(layout)
    rests = core().resting_units([sum(p.numel() for p in unit.params if id(p) in trained) for unit in plan.units], managed.tiers.rest_share)
    units = [managed.add_unit(unit, dtype_of, lambda p: id(p) in trained, keep_master=bool(trained), persistent_numel=layout.persistent_numel,
                              state_rests=state_rests) for unit, state_rests in zip(plan.units, rests)]
    _move_rest(model, device)
    managed.store.trim_pool()
    trim_heap()
    managed.module_hooks.install_units(plan, units)
    managed.module_hooks.install_root(model)
    return managed


def cast_only(model, layout, device):
    """Stages 0-2 without an optimizer: nothing to cut, nothing to reduce."""
    dtype_of = _target_dtype(layout)
    for name, parameter in model.named_parameters():
        if home_of(parameter) is None:
            if parameter.is_meta:
                raise RuntimeError(f"parameter '{name}' is on the meta device and has no values")
            parameter.data = parameter.data.to(device=device, dtype=dtype_of(parameter))
    _move_rest(model, device)


def connect(managed, layout, config, basic, step_number, parameter_offload):
    """Collective. Gradients to slices, and the optimizer that steps them."""
    reducer = lib().GradReducer(managed.store, layout.comm_dtype, layout.pre_scale, not layout.partial_step, managed.tiers.rest)
    managed.watch_backward(reducer)
    group_of = {id(p): number for number, group in enumerate(basic.param_groups) for p in group["params"]}
    in_bf16 = "skip" if config.bf16.check_grad_overflow else "step"
    on_bad = "scale" if config.fp16.enabled else in_bf16 if config.bf16.enabled else "raise"
    options = StepOptions(scaler=scaler_for(config.fp16), clip=float(config.gradient_clipping), partial_slices=layout.partial_step,
                          on_bad=on_bad, report_norm=bool(config.zero_optimization.compute_grad_norm), step_number=step_number, parameter_offload=parameter_offload)
    return ShardedOptimizer(managed, basic, group_of, options)


def cast_buffers(model, config):
    """data_types.buffer_dtype: floating-point buffers too, but for those the configuration keeps in fp32."""
    wanted = config.data_types.buffer_dtype
    if not wanted:
        return
    import fnmatch
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[str(wanted)]
    keep = config.data_types.keep_in_fp32_modules
    patterns = [] if keep == "auto" else list(keep)
    for path, module in model.named_modules():
        for name, buffer in module._buffers.items():
            full = f"{path}.{name}" if path else name
            if buffer is not None and buffer.is_floating_point() and not any(fnmatch.fnmatch(full, p) for p in patterns):
                module._buffers[name] = buffer.to(dtype)
