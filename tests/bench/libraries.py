# SPDX-License-Identifier: Apache-2.0
"""One adapter for each library that is compared. Each turns a model and a few numbers into `micro_step(batch, last) -> loss`.

AdamW has the same hyperparameters everywhere and gradients are never clipped, so all do the same arithmetic and all losses agree.
Imports belong to `prepare`, so that memory can be counted from after them.
"""
import contextlib
from typing import NamedTuple

import torch

ADAMW = {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
LOSS_SCALE = 1024.0  # static, for fp16: a dynamic one would skip different steps in different libraries
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Setup(NamedTuple):
    model: str
    stage: int
    dtype: str
    accumulation: int
    batch: int
    world_size: int
    folder: str = ""   # of files in which the optimizer's state, and at stage 3 the parameters, rest; "": memory


def _fused(model):
    return torch.optim.AdamW(model.parameters(), fused=True, **ADAMW)


class Loop:
    """Plain torch, no communication: each rank trains alone. The bare loop that overhead is counted over."""

    def prepare(self, setup):
        if setup.dtype == "fp16":
            raise SystemExit("the bare loop has no loss scaling: use fp32 or bf16")

    def build(self, setup, build):
        self.setup = setup
        self.model = build().to(DTYPES[setup.dtype])
        self.optimizer = _fused(self.model)
        return self

    def micro_step(self, batch, last):
        loss = self.model(*batch)
        (loss / self.setup.accumulation).backward()
        if last:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return loss


class Ddp(Loop):
    def prepare(self, setup):
        from torch.nn.parallel import DistributedDataParallel

        self.wrap = DistributedDataParallel
        if setup.dtype == "fp16":
            raise SystemExit("DDP is compared at fp32 and bf16 (autocast)")

    def build(self, setup, build):
        self.setup = setup
        module = build()
        self.model = self.wrap(module)
        self.optimizer = _fused(module)
        return self

    def micro_step(self, batch, last):
        wait = contextlib.nullcontext() if last else self.model.no_sync()
        cast = torch.autocast("cpu", torch.bfloat16) if self.setup.dtype == "bf16" else contextlib.nullcontext()
        with wait:
            with cast:
                loss = self.model(*batch)
            (loss / self.setup.accumulation).backward()
        if last:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return loss


class Fsdp2(Loop):
    def prepare(self, setup):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        self.fully_shard, self.policy, self.init_mesh = fully_shard, MixedPrecisionPolicy, init_device_mesh
        if setup.dtype == "fp16":
            raise SystemExit("FSDP2 is compared at fp32 and bf16")

    def build(self, setup, build):
        self.setup = setup
        self.model = build()
        mesh = self.init_mesh("cpu", (setup.world_size,))
        options = {"mesh": mesh}
        if setup.dtype == "bf16":
            options["mp_policy"] = self.policy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for unit in self.model.units():
            self.fully_shard(unit, **options)
        self.fully_shard(self.model, **options)
        self.optimizer = _fused(self.model)
        return self

    def micro_step(self, batch, last):
        self.model.set_requires_gradient_sync(last)
        return super().micro_step(batch, last)


class DeepSpeedApi:
    """DeepSpeed and this project's library: the same calls, the same JSON."""

    def prepare(self, setup):
        import deepspeed

        self.initialize = deepspeed.initialize  # reading it is what imports a lazy package
        self.Init = deepspeed.zero.Init if setup.stage == 3 else None
        self.version, self.file = deepspeed.__version__, deepspeed.__file__

    @staticmethod
    def config(setup):
        params = {**ADAMW, "betas": list(ADAMW["betas"])}
        config = {
            "train_micro_batch_size_per_gpu": setup.batch,
            "gradient_accumulation_steps": setup.accumulation,
            "gradient_clipping": 0.0,
            "optimizer": {"type": "AdamW", "params": params},
            "zero_optimization": {"stage": setup.stage},
            "steps_per_print": 10**9,
        }
        if setup.folder:
            files = {"device": "nvme", "nvme_path": setup.folder}
            config["zero_optimization"]["offload_optimizer"] = files
            config["aio"] = {"block_size": 1 << 20, "queue_depth": 32, "single_submit": False, "overlap_events": True, "intra_op_parallelism": 1}
            if setup.stage == 3:
                config["zero_optimization"]["offload_param"] = files
        if setup.dtype == "bf16":
            config["bf16"] = {"enabled": True}
        if setup.dtype == "fp16":
            config["fp16"] = {"enabled": True, "loss_scale": LOSS_SCALE}
        return config

    def build(self, setup, build):
        config = self.config(setup)
        with self.Init(config_dict_or_path=config) if setup.stage == 3 else contextlib.nullcontext():
            module = build()
        self.engine = self.initialize(model=module, model_parameters=module.parameters(), config=config)[0]
        return self

    def micro_step(self, batch, last):
        loss = self.engine(*batch)
        self.engine.backward(loss)
        self.engine.step()
        return loss


LIBRARIES = {"ours": DeepSpeedApi, "deepspeed": DeepSpeedApi, "ddp": Ddp, "fsdp2": Fsdp2, "loop": Loop}
