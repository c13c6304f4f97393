# SPDX-License-Identifier: Apache-2.0
"""Trains a case with the engine, on one rank of many, and returns what the reference loop returns."""
import contextlib
import os

import torch
import torch.distributed as dist

from tests.parity.reference_loop import Reference

STAGES = (0, 1, 2, 3)


def config(stage, accumulation=1, *, lr=1e-3, optimizer="AdamW", precision="fp32", zero=None, **top):
    """A configuration with many small units that really shard at stage 3. `optimizer` None: the caller brings one."""
    cfg = {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": accumulation, "gradient_clipping": 0.0,
           "zero_optimization": {"stage": stage, "stage3_prefetch_bucket_size": 1000, "stage3_param_persistence_threshold": 0, **(zero or {})}}
    if optimizer is not None:
        cfg["optimizer"] = {"type": optimizer, "params": {"lr": lr, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.01}}
    if precision == "bf16":
        cfg["bf16"] = {"enabled": True}
    if precision == "fp16":
        cfg["fp16"] = {"enabled": True, "loss_scale": 1024.0}
    return {**cfg, **top}


def start(model, cfg, **options):
    """The engine alone."""
    import deepspeed
    return deepspeed.initialize(model=model, config=cfg, **options)[0]


def full_parameters(model):
    """name -> the fp32 value the optimizer works on, the parameter itself (widened) where it is not trained. Collective."""
    from deepspeed.utils import safe_get_full_fp32_param
    from deepspeed.zero import GatheredParameters
    values = {}
    for name, p in model.named_parameters():
        value = safe_get_full_fp32_param(p)
        if value is None:
            with GatheredParameters([p]):
                value = p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True)
        values[name] = value.clone()
    return values


def cast_batch(batch, precision):
    dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    return tuple(x.to(dtype) if dtype and isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in batch)


def engine_loop(engine, case, steps, accumulation=1, precision="fp32", lr_at=None):
    """[steps, accumulation] losses of this rank, and the norm of every step."""
    losses, norms = torch.zeros(steps, accumulation, dtype=torch.float64), []
    for step in range(steps):
        if lr_at is not None:
            for group in engine.optimizer.param_groups:
                group["lr"] = lr_at(step)
        for micro in range(accumulation):
            loss = engine(*cast_batch(case.batch(step, micro, dist.get_rank()), precision))
            engine.backward(loss)
            engine.step()
            losses[step, micro] = loss.item()
        norms.append(engine.get_global_grad_norm())
    return losses, norms


def train(case, stage, steps, accumulation=1, precision="fp32", lr_at=None, model_of=None, optimizer_of=None, **options):
    """A Reference of the engine's training: the losses of all ranks, the parameters after the last step."""
    model = model_of(case) if model_of else case.build()
    client = optimizer_of([p for p in model.parameters() if p.requires_grad]) if optimizer_of else None
    options.setdefault("optimizer", "AdamW" if client is None else None)
    engine = start(model, config(stage, accumulation, precision=precision, **options), optimizer=client)
    losses, norms = engine_loop(engine, case, steps, accumulation, precision, lr_at)
    parameters = full_parameters(engine.module)
    engine.destroy()
    return Reference(of_all_ranks(losses), parameters, norms)


def of_all_ranks(losses):
    """[...] of this rank -> [..., world_size]."""
    found = [torch.empty_like(losses) for _ in range(dist.get_world_size())]
    dist.all_gather(found, losses)
    return torch.stack(found, -1)


def assert_same_bits(got, want, what=""):
    """Losses, parameters and norms of two References, every bit."""
    for name, value in want.parameters.items():
        assert torch.equal(got.parameters[name], value), (
            f"{what}: {name} differs by {(got.parameters[name] - value).abs().max():.3g} of {value.abs().max():.3g}")
    assert torch.equal(got.losses, want.losses), f"{what}: losses differ: {got.losses} {want.losses}"
    # The squares are added in another grouping at each stage, in float64.
    torch.testing.assert_close(torch.tensor(got.norms), torch.tensor(want.norms), rtol=1e-12, atol=0, msg=lambda m: f"{what}: norms: {m}")


@contextlib.contextmanager
def transport(choice):
    """DS_TRANSPORT while engines are built."""
    before = os.environ.get("DS_TRANSPORT")
    os.environ["DS_TRANSPORT"] = choice
    try:
        yield
    finally:
        if before is None:
            del os.environ["DS_TRANSPORT"]
        else:
            os.environ["DS_TRANSPORT"] = before
