# SPDX-License-Identifier: Apache-2.0
"""What callers pass to initialize(), brought into one form."""
import os

import torch

from deepspeed import _environment
from deepspeed.config import DeepSpeedConfigError
from deepspeed.telemetry import logger


def _argument(args, name):
    if args is None:
        return None
    return args.get(name) if isinstance(args, dict) else getattr(args, name, None)


def config_source(args, config, config_params):
    """The one configuration among `config`, `config_params` and args.deepspeed_config (or its old name)."""
    if config is not None and config_params is not None and config is not config_params:
        raise AssertionError("initialize: config and config_params are both given; config_params is the old name of config")
    config = config if config is not None else config_params
    from_args = _argument(args, "deepspeed_config") or _argument(args, "deepscale_config")
    if config is not None and from_args is not None:
        raise AssertionError(f"initialize: a configuration is given twice, by config= and by --deepspeed_config {from_args}")
    source = config if config is not None else from_args
    if source is None:
        raise AssertionError("initialize: no configuration: pass config=<dict or path>, or --deepspeed_config on the command line")
    return source


def local_rank_of(args):
    """LOCAL_RANK, which a launcher or init_distributed has set; args.local_rank must agree and follows it."""
    local_rank = _environment.read("LOCAL_RANK")
    if local_rank is None:
        raise AssertionError("initialize: LOCAL_RANK is not set in the environment: start the script with the deepspeed launcher or "
                             "torchrun, or call deepspeed.init_distributed() first")
    given = _argument(args, "local_rank")
    if isinstance(given, int) and not isinstance(given, bool) and 0 <= given != local_rank:
        raise AssertionError(f"initialize: args.local_rank is {given} but LOCAL_RANK in the environment is {local_rank}")
    if given is not None and not isinstance(args, dict):
        args.local_rank = local_rank
    device_rank = _argument(args, "device_rank")
    return int(device_rank) if device_rank is not None else local_rank


def parameter_groups(model, model_parameters):
    """[{"params": [...], ...}] from parameters, groups, a generator, or (None) all trainable parameters of the model."""
    if model_parameters is None:
        return [{"params": [p for p in model.parameters() if p.requires_grad]}]
    items = list(model_parameters)
    if items and isinstance(items[0], dict):
        for group in items:
            if not isinstance(group["params"], list):
                group["params"] = [group["params"]] if isinstance(group["params"], torch.Tensor) else list(group["params"])
        return items
    if items and isinstance(items[0], tuple):  # named_parameters()
        items = [parameter for _, parameter in items]
    return [{"params": [p for p in items if p.requires_grad]}]


def listed_parameters(model, optimizer, from_client, model_parameters):
    """What the caller means to train, frozen or not: what is in his optimizer, or was given as model_parameters; else all."""
    if from_client:
        return [p for group in optimizer.param_groups for p in group["params"]]
    if model_parameters is None:
        return list(model.parameters())
    found = []
    for item in model_parameters:
        found += item["params"] if isinstance(item, dict) else [item[1]] if isinstance(item, tuple) else [item]
    return found


def check_dtypes(model, trained, compute_dtype):
    """Trained parameters become compute_dtype, or keep a dtype that can be stepped."""
    if compute_dtype is not None:
        return
    for name, parameter in model.named_parameters():
        if id(parameter) in trained and parameter.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise ValueError(f"parameter '{name}' is to be trained and is {parameter.dtype}; float32, float16 and bfloat16 can be trained: "
                             "convert it before initialize() (module.float(), or bf16.enabled, which converts all), or freeze it with "
                             "requires_grad_(False)")


def check_foreign(optimizer, model):
    """Every parameter of the optimizer must be one of the model."""
    own = {id(p) for p in model.parameters()}
    for number, group in enumerate(optimizer.param_groups):
        for index, parameter in enumerate(group["params"]):
            if id(parameter) not in own:
                raise ValueError(f"the optimizer's param_groups[{number}]['params'][{index}], of shape {tuple(parameter.shape)}, is not a "
                                 "parameter of the model given to initialize(): build the optimizer from this model's parameters")


def check_device(device, local_rank):
    if device.type != "cuda":
        return
    if not torch.cuda.is_available():
        raise RuntimeError("CUDA was asked for (DS_ACCELERATOR=cuda), but torch sees no GPU: unset DS_ACCELERATOR or use DS_ACCELERATOR=cpu")
    if device.index is not None and device.index >= torch.cuda.device_count():
        raise RuntimeError(f"LOCAL_RANK {local_rank} needs GPU {device.index}, but only {torch.cuda.device_count()} are visible: start fewer "
                           "ranks on this host, or look at CUDA_VISIBLE_DEVICES")


def refuse_unbuilt(config, device):
    """Contradictions that show only now that the device and the caller's objects are known."""
    if config.optimizer.type is not None and "max_grad_norm" in config.optimizer.params:
        raise DeepSpeedConfigError("optimizer.params.max_grad_norm: use gradient_clipping at the top level")
    if config.fp16.enabled and device.type == "cpu" and os.environ.get("DS_ALLOW_DEPRECATED_FP16"):
        logger.warning("DS_ALLOW_DEPRECATED_FP16 has no meaning here")
