# SPDX-License-Identifier: Apache-2.0
"""The basic optimizer: the caller's own, or the one the JSON names."""
import torch

from deepspeed.config import DeepSpeedConfigError
from deepspeed._errors import ZeRORuntimeException
from deepspeed.engine.arguments import check_foreign, parameter_groups
from deepspeed.telemetry import logger

_OWN = ("adam", "adamw", "adagrad", "lamb", "lion", "muon")
# Keys of the known package that choose an implementation, not a number.
_IMPLEMENTATION_KEYS = ("torch_adam", "adam_w_mode", "fp32_optimizer_states", "set_grad_none")


def _adam(name, params, groups):
    options = {k: v for k, v in params.items() if k not in _IMPLEMENTATION_KEYS}
    decoupled = name == "adamw" or params.get("adam_w_mode", True)
    if params.get("torch_adam"):
        kind = torch.optim.AdamW if decoupled else torch.optim.Adam
        return kind(groups, **{k: v for k, v in options.items() if k != "bias_correction"})
    from deepspeed.ops.adam import FusedAdam
    return FusedAdam(groups, adam_w_mode=bool(decoupled), **options)


def _own(name, params, groups):
    if name in ("adam", "adamw"):
        return _adam(name, params, groups)
    options = {k: v for k, v in params.items() if k not in _IMPLEMENTATION_KEYS}
    if name == "adagrad":
        from deepspeed.ops.adagrad import DeepSpeedCPUAdagrad
        return DeepSpeedCPUAdagrad(groups, **options)
    if name == "lamb":
        from deepspeed.ops.lamb import FusedLamb
        return FusedLamb(groups, **options)
    if name == "lion":
        from deepspeed.ops.lion import FusedLion
        return FusedLion(groups, **options)
    from deepspeed.engine.muon import muon_from_config
    return muon_from_config(params, groups)


def from_config(section, groups, model):
    """The optimizer of the `optimizer` section on these groups."""
    name, params = section.type, dict(section.params)
    if "betas" in params:
        params["betas"] = tuple(params["betas"])
    try:
        if name.lower() in _OWN:
            if name.lower() == "muon":
                from deepspeed.engine.muon import tag_parameters
                tag_parameters(model, params)
            return _own(name.lower(), params, groups)
        kind = getattr(torch.optim, name, None)
        if not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)):
            if name.lower() == "sgd":
                kind = torch.optim.SGD
            else:
                raise DeepSpeedConfigError(f"optimizer.type: {name!r} is none of Adam, AdamW, Adagrad, Lamb, Lion, Muon, SGD and no class of "
                                           "torch.optim")
        return kind(groups, **params)
    except TypeError as error:
        raise DeepSpeedConfigError(f"optimizer.params: {name}: {error}") from error


def choose(config, model, optimizer, model_parameters):
    """(basic optimizer or None, whether it came from the caller)."""
    if optimizer is None:
        if config.optimizer.type is None:
            return None, False
        return from_config(config.optimizer, parameter_groups(model, model_parameters), model), False
    if config.optimizer.type is not None:
        logger.warning("the optimizer passed to initialize() is used; the optimizer section of the configuration is not")
    basic = optimizer
    if not isinstance(optimizer, torch.optim.Optimizer):
        if not callable(optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer or a callable that makes one, got {type(optimizer).__name__}")
        basic = optimizer([p for group in parameter_groups(model, model_parameters) for p in group["params"]]
                          if model_parameters is None else parameter_groups(model, model_parameters))
    check_foreign(basic, model)
    _check_allowed(config, basic)
    return basic, True


def _check_allowed(config, optimizer):
    from deepspeed.zero.recognise import is_zero_supported_optimizer
    zero = config.zero_optimization
    if zero.stage == 0:
        return
    offloads = zero.offload_optimizer.device != "none"
    own = type(optimizer).__module__.startswith("deepspeed.ops.")
    if offloads and config.zero_force_ds_cpu_optimizer and not own:
        raise ZeRORuntimeException(
            f"zero_optimization.offload_optimizer is on and the optimizer is {type(optimizer).__name__}: use "
            "deepspeed.ops.adam.DeepSpeedCPUAdam, or set \"zero_force_ds_cpu_optimizer\": false")
    if not is_zero_supported_optimizer(optimizer) and not config.zero_allow_untested_optimizer:
        raise AssertionError(
            f"{type(optimizer).__name__} has not been tested with ZeRO: each rank steps fp32 slices of the parameters, which is right for "
            "optimizers that treat every element by itself. Set \"zero_allow_untested_optimizer\": true to use it")
