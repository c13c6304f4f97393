# SPDX-License-Identifier: Apache-2.0
"""What N ranks should compute, computed by one process with plain torch: the oracle of the parity tests.

    want = reference_loop(CASES["tied"], world_size=2, steps=5, accumulation=4)
    want.losses        # float64, [steps, accumulation, world_size]: the loss each rank sees
    want.parameters    # name -> the parameter after the last step, in the master dtype
    want.norms         # the global gradient norm of each step, before clipping

The objective of a step is the mean over ranks and micro-batches of the ranks' losses. The gradient of each (micro-batch,
rank) is taken alone in the model's dtype and added, in float32 (float64 for a float64 run), in the order micro-batch, then
rank. The optimizer works on master weights of that wider dtype, which are then rounded into the model: for a float32 model
this is the loop everyone writes, for bf16 and fp16 it is mixed precision with master weights.

Note [Tolerances]: in float32 the bar is 1e-5 of the magnitude (`close`). For lower dtypes it is twice the error that this
loop itself has at that dtype against float64, the largest over the steps (losses) or over the elements of one parameter
(`Tolerance.measure`): a library may not be worse than twice as far from the truth as plain torch.
"""
from typing import Callable, NamedTuple, Optional

import torch

FP32_RELATIVE = 1e-5


class Reference(NamedTuple):
    losses: torch.Tensor
    parameters: dict
    norms: list


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)


def _cast(model, dtype):
    """float64 and the half types apply to the whole model; float32 leaves a mixed model as it was built."""
    return model if dtype == torch.float32 else model.to(dtype)


def _cast_inputs(batch, dtype):
    return tuple(x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in batch)


def _wide(tensor):
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32), copy=True)


class _Masters:
    """The trainable parameters in the wide dtype, their gradients, and the way back into the model."""

    def __init__(self, model, unused):
        self.pairs = {name: (p, torch.nn.Parameter(_wide(p))) for name, p in model.named_parameters() if p.requires_grad}
        self.unused = unused

    def parameters(self):
        return [master for _, master in self.pairs.values()]

    def clear(self):
        for _, master in self.pairs.values():
            master.grad = torch.zeros_like(master) if self.unused == "zeros" else None

    def add(self, scale):
        for p, master in self.pairs.values():
            if p.grad is None:
                continue
            if master.grad is None:
                master.grad = torch.zeros_like(master)
            master.grad += p.grad.to(master.dtype) * scale
            p.grad = None

    @torch.no_grad()
    def write_back(self):
        for p, master in self.pairs.values():
            p.copy_(master)


def reference_loop(case, world_size, steps, accumulation=1, *, dtype=torch.float32, optimizer: Callable = adamw,
                   clip: float = 0.0, loss_scale: float = 1.0, lr_at: Optional[Callable] = None, unused="zeros") -> Reference:
    """Runs the loop described above.

    case: has build() -> module whose forward returns the scalar loss, and batch(step, micro, rank) -> its arguments.
    optimizer: parameters -> torch.optim.Optimizer. clip: global norm bound, 0 for none. loss_scale: static, powers of two
    change nothing in wide dtypes. lr_at: step -> learning rate. unused: "zeros" gives a parameter without any gradient a zero
    gradient (moments and weight decay act on it), "skip" leaves it alone as torch does.
    """
    model = _cast(case.build(), dtype)
    masters = _Masters(model, unused)
    optimizer = optimizer(masters.parameters())
    losses = torch.zeros(steps, accumulation, world_size, dtype=torch.float64)
    norms = []
    for step in range(steps):
        masters.clear()
        for micro in range(accumulation):
            for rank in range(world_size):
                loss = model(*_cast_inputs(case.batch(step, micro, rank), dtype))
                losses[step, micro, rank] = loss.item()
                (loss * loss_scale).backward()
                masters.add(1.0 / (loss_scale * world_size * accumulation))
        bound = clip if clip > 0 else float("inf")
        norms.append(torch.nn.utils.clip_grad_norm_(masters.parameters(), bound).item())
        if lr_at is not None:
            for group in optimizer.param_groups:
                group["lr"] = lr_at(step)
        optimizer.step()
        masters.write_back()
    frozen = {name: _wide(p) for name, p in model.named_parameters() if not p.requires_grad}
    trained = {name: master.detach() for name, (_, master) in masters.pairs.items()}
    return Reference(losses, {**trained, **frozen}, norms)


class Tolerance(NamedTuple):
    """Absolute bounds around a float64 reference, see Note [Tolerances]."""

    truth: Reference
    losses: float
    parameters: dict

    @staticmethod
    def measure(case, world_size, steps, accumulation=1, *, dtype, factor=2.0, **options):
        truth = reference_loop(case, world_size, steps, accumulation, dtype=torch.float64, **options)
        plain = reference_loop(case, world_size, steps, accumulation, dtype=dtype, **options)
        errors = {name: factor * (plain.parameters[name] - value).abs().max().item() for name, value in truth.parameters.items()}
        return Tolerance(truth, factor * (plain.losses - truth.losses).abs().max().item(), errors)

    def check(self, losses, parameters):
        """Raises AssertionError naming the first loss or parameter outside the bounds."""
        worst = (torch.as_tensor(losses, dtype=torch.float64) - self.truth.losses).abs().max().item()
        assert worst <= self.losses, f"losses: off by {worst:.3g}, allowed {self.losses:.3g}"
        for name, want in self.truth.parameters.items():
            worst = (parameters[name].double() - want).abs().max().item()
            assert worst <= self.parameters[name], f"{name}: off by {worst:.3g}, allowed {self.parameters[name]:.3g}"


def close(got, want, relative=FP32_RELATIVE):
    """float32 parity of two References: losses within `relative` of their magnitude, elements of that of their parameter's largest."""
    difference = (got.losses - want.losses).abs()
    assert (difference <= relative * want.losses.abs()).all(), f"losses differ by {(difference / want.losses.abs()).max():.3g}"
    assert set(got.parameters) == set(want.parameters)
    for name, value in want.parameters.items():
        worst = (got.parameters[name].double() - value.double()).abs().max().item()
        bound = relative * value.abs().max().item()
        assert worst <= bound, f"{name}: off by {worst:.3g}, allowed {bound:.3g}"
