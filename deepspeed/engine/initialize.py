# SPDX-License-Identifier: Apache-2.0
"""deepspeed.initialize."""
from typing import Callable, Iterable, Union

import torch

from deepspeed import comm
from deepspeed.config import load_config
from deepspeed.device import get_accelerator
from deepspeed.engine.arguments import config_source
from deepspeed.engine.engine import DeepSpeedEngine

DeepSpeedOptimizerCallable = Callable[[Union[Iterable[torch.nn.Parameter], dict]], torch.optim.Optimizer]
DeepSpeedSchedulerCallable = Callable[[torch.optim.Optimizer], object]


def initialize(args=None, model=None, optimizer=None, model_parameters=None, training_data=None, lr_scheduler=None,
               distributed_port=29500, mpu=None, dist_init_required=None, collate_fn=None, config=None, mesh_param=None,
               config_params=None):
    """Wraps a model for training as the configuration says.

    model: the torch module; its parameters are moved into flat buffers (and sharded at ZeRO stage 3) in place.
    optimizer: a torch optimizer over the model's parameters, a callable that makes one from them, or None for the JSON's.
    model_parameters: parameters or param groups for an optimizer made here; default: all that require gradients.
    training_data: a dataset; the third result is then a data loader over this rank's share.
    lr_scheduler: a scheduler object, or a callable that makes one from the optimizer, or None for the JSON's.
    config: dict, path of a JSON file, or base64 text (`config_params` is its old name; `args.deepspeed_config` works too).

    Returns (engine, optimizer, data loader, scheduler). Collective: every rank calls it with the same model.
    """
    if model is None:
        raise AssertionError("initialize: model is None; pass the torch.nn.Module to train")
    from deepspeed.zero.init import shutdown_init_context, restore_init_context
    suspended = shutdown_init_context()
    try:
        source = config_source(args, config, config_params)
        accelerator = get_accelerator()
        comm.init_distributed(distributed_port=distributed_port, dist_init_required=dist_init_required)
        mesh = None
        if mesh_param is not None:
            mesh = comm.initialize_mesh_device(mesh_param, ("data_parallel", "sequence_parallel"))
        cfg = load_config(source, device=accelerator.device_name(), mpu=mpu, mesh_device=mesh)
        engine = DeepSpeedEngine(args=args, model=model, optimizer=optimizer, model_parameters=model_parameters,
                                 training_data=training_data, lr_scheduler=lr_scheduler, mpu=mpu, collate_fn=collate_fn, config=cfg,
                                 raw_config=source)
    finally:
        restore_init_context(suspended)
    return engine, engine.optimizer, engine.training_dataloader, engine.lr_scheduler
