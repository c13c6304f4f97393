# SPDX-License-Identifier: Apache-2.0
"""The trial that a module must pass before replace_modules() fuses it: a twin with random weights computes random input by the module's own forward and
by the fused one, and output and gradients must agree to within a few roundings."""
import math

import torch

# What two correct implementations may differ by, in units of the dtype's rounding of the largest value: either rounds its result once (half
# a unit) and may round what lies between once or twice. Gradients pass through twice as many roundings.
_OUTPUT_ULPS, _GRADIENT_ULPS = 4, 8

# A clamp or a threshold of the module's own shows itself at one of these sizes of its input, or at none that matters.
_SIZES = (1.0, 0.01, 100.0)
_PERIOD = 65537    # of large random weights
_CHUNK = 1 << 16   # elements that are compared at a time: a trial should not need much more memory than the module

# What somebody's forward raises when it cannot take what a trial gives it; the module then stays as it is, and the refusal says why.
_REFUSALS = (RuntimeError, ValueError, TypeError, AttributeError)


def first_that_agrees(module, rule, candidates):
    """(the candidate whose forward agrees with the module's own, None) or (None, why none does)."""
    _, device = _dtype_and_device(module)
    devices = [] if device.type in ("meta", "cpu") else [device.index or 0]
    why = ""
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(0)
        for choice in candidates:
            try:
                why = _trial(module, rule, rule.forwards[choice])
            except _REFUSALS as error:
                why = f"the trial failed: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
            if not why:
                return choice, None
    return None, why


def _trial(module, rule, fused_forward):
    """Why the two forwards do not agree, or nothing.

    A large module is tried in smaller widths first. If all agrees there, its own widths need to give the same output and gradient of the input, which
    takes a fifth of the products and no gradients as large as the module; else (its forward may depend on its widths) it is tried as a whole.
    """
    sizes = rule.smaller(module)
    if sizes:
        try:
            differs = disagreement(random_twin(module, sizes), rule, fused_forward)
        except _REFUSALS:  # tried again in its own widths, which then says what failed
            differs = "in smaller widths the trial failed"
        if not differs:
            return disagreement(random_twin(module).requires_grad_(False), rule, fused_forward, sizes=(1.0,))
    return disagreement(random_twin(module), rule, fused_forward)


# ---- the twin

def random_twin(module, sizes=None, size=None):
    """A module of the same class and settings with random weights of its own: the real ones may be sharded, or on the meta device. No hooks.

    sizes: {child: (out_features, in_features)} of linear layers that get others than theirs; size: of this one."""
    twin = module.__class__.__new__(module.__class__)
    twin.__dict__ = dict(module.__dict__)
    for registry, value in module.__dict__.items():
        if registry.endswith("_hooks"):
            twin.__dict__[registry] = type(value)()
    twin._parameters = {name: p if p is None else torch.nn.Parameter(_random_weights(p, (size or p.shape)[:p.dim()]))
                        for name, p in module._parameters.items()}
    twin._modules = {name: child if child is None else random_twin(child, size=(sizes or {}).get(name)) for name, child in module._modules.items()}
    if size:
        twin.out_features, twin.in_features = size
    return twin


def _random_weights(p, shape):
    """Weights under which a linear layer's output is as large as its input: in float16 the product of two of them still has room. Those of a large one
    are repeated, with a period that no width divides: drawing each would take longer than the trial."""
    count, columns = math.prod(shape), shape[-1] if len(shape) > 1 else 1
    some = torch.randn(min(count, _PERIOD), dtype=p.dtype, device="cpu" if p.device.type == "meta" else p.device).mul_(columns ** -0.5)
    return (some.repeat(-(-count // _PERIOD))[:count] if count > _PERIOD else some).reshape(tuple(shape))


def _dtype_and_device(module):
    for tensor in module.parameters():
        return tensor.dtype, tensor.device
    return torch.get_default_dtype(), torch.device("cpu")


# ---- the comparison

def disagreement(twin, rule, fused_forward, sizes=_SIZES):
    """Why the two forwards do not agree, in training and evaluation and for input of each size; empty if they do. Gradients are those of the inputs
    and of the twin's parameters that require them."""
    dtype, device = _dtype_and_device(twin)
    samples = [t.to(device, dtype) if t.is_floating_point() else t.to(device) for t in rule.sample(twin)]
    for training in (True, False):
        twin.train(training)
        for size in sizes:
            why = _disagreement_at(twin, fused_forward, [t * size if t.is_floating_point() else t for t in samples], may_overflow=size > 1)
            if why:
                return f"{why} ({'training' if training else 'evaluation'}, input of size {size:g})"
    return ""


def _disagreement_at(twin, fused_forward, inputs, may_overflow):
    inputs = [t.requires_grad_(t.is_floating_point()) for t in inputs]
    with torch.enable_grad():
        state = _random_state(inputs[0].device)
        own = type(twin).forward(twin, *inputs)
        if not torch.equal(_random_state(inputs[0].device), state):
            return "it draws random numbers"
        fused = fused_forward(twin, *inputs)
    if own.shape != fused.shape or own.dtype != fused.dtype:
        return f"it gives {own.dtype}{list(own.shape)}, the fused operator {fused.dtype}{list(fused.shape)}"
    why = _too_far_apart("output", own.detach(), fused.detach(), _OUTPUT_ULPS, may_overflow)
    weights = torch.cos(torch.arange(own.numel(), device=own.device, dtype=torch.float32)).reshape(own.shape).to(own.dtype)
    for leaf in filter(lambda t: t.requires_grad, [*inputs, *twin.parameters()]):   # one by one: two gradients are alive at a time, not all twice
        if why:
            break
        pair = [torch.autograd.grad(output, leaf, weights, retain_graph=True)[0] for output in (own, fused)]
        why = _too_far_apart("gradient", *pair, _GRADIENT_ULPS, may_overflow)
    return why


def _too_far_apart(what, own, fused, ulps, may_overflow):
    largest = apart = 0.0
    wide = torch.promote_types(own.dtype, torch.float32)  # the difference of neighbours is exact there, others' need not be
    for a, b in zip(own.reshape(-1).split(_CHUNK), fused.reshape(-1).split(_CHUNK)):
        a, b = a.to(wide), b.to(wide)
        top = a.abs().max().item()
        if may_overflow and not math.isfinite(top):
            return ""
        largest, apart = max(largest, top), max(apart, a.sub(b).abs().max().nan_to_num(nan=torch.inf).item())
    if not apart <= ulps * torch.finfo(own.dtype).eps * largest:
        return f"the {what} differs by {apart:.3g} where the largest value is {largest:.3g}"
    return ""


def _random_state(device):
    return torch.get_rng_state() if device.type == "cpu" else torch.cat([torch.get_rng_state(), torch.get_device_module(device).get_rng_state(device)])
