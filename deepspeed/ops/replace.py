# SPDX-License-Identifier: Apache-2.0
"""Puts the fused operators into a model that somebody else wrote, after a numerical check, and takes them out again.

Note [Swapping the class]: a module is not exchanged, its class is: ``module.__class__`` becomes a subclass of what it was with another
``forward``. So the parameters, hooks, buffers, names in the state_dict and every reference to the module stay what they are, it works before and after
``deepspeed.initialize``, ``isinstance`` still holds, and undoing it restores the very same object.
"""
import functools
from dataclasses import dataclass, field

import torch

from deepspeed.ops._base import has_kernels
from deepspeed.ops.replace_rules import RULES

_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# What two correct implementations may differ by, in units of the dtype's rounding of the largest value: either rounds its result once (half
# a unit) and may round what lies between once or twice. Gradients pass through twice as many roundings.
_OUTPUT_ULPS, _GRADIENT_ULPS = 4, 8


@dataclass
class Replacement:
    """What replace_modules() did to a model; `restore()` undoes it. `print(replacement)` gives a table.

    replaced: {module name: rule}. refused: {module name: why a candidate was left as it was}.
    """
    model: torch.nn.Module
    replaced: dict = field(default_factory=dict)
    refused: dict = field(default_factory=dict)

    def restore(self):
        """The model is as it was; modules that were removed from it meanwhile are left alone."""
        restore_modules(self.model)
        self.replaced.clear()

    def __str__(self):
        lines = [f"{name or '(model)'}: {rule}" for name, rule in self.replaced.items()]
        lines += [f"{name or '(model)'}: kept ({why})" for name, why in self.refused.items()]
        return "\n".join(lines) or "nothing to replace"


def replace_modules(model, include=None, exclude=()):
    """Swaps the model's norms, activations, gated MLPs, softmax and loss modules for the fused operators. Returns a Replacement.

    Every kind of module is first tried on random input and random weights of the module's dtype and device: output and gradients must agree with the module's
    own to within a few roundings, else it stays as it is and `refused` says why. Found are modules of torch.nn and of models in the style of
    Hugging Face (RMSNorm classes, `gate_proj/up_proj/down_proj` MLPs, activation classes), not functions called inside somebody's `forward`.

    include, exclude: names of rules, of "layer_norm", "rms_norm", "activation", "gated_mlp", "softmax", "cross_entropy"; default: all.
    Input of another dtype than the weights, as under autocast, and of dtypes or devices without kernels goes the module's own way.
    Weights, their names and hooks are untouched. On a compiled module it must be called before torch.compile.
    """
    wanted = _wanted(include, exclude)
    replacement, verdicts = Replacement(model), {}
    for name, module in model.named_modules():
        if _original_class(module) is not None:
            continue
        for rule in wanted:
            candidates = rule.candidates(module)
            if not candidates:
                continue
            if "forward" in module.__dict__:
                replacement.refused[name] = f"{rule.name}: something has given this module a forward of its own"
                break
            key = (rule.name, type(module), rule.configuration(module), _dtype_and_device(module))
            if key not in verdicts:
                verdicts[key] = _first_that_agrees(module, rule, candidates)
            choice, why = verdicts[key]
            if choice is None:
                replacement.refused[name] = f"{rule.name}: {why}"
            else:
                module.__class__ = _fused_class(type(module), rule.name, choice)
                replacement.replaced[name] = rule.name
            break
    return replacement


def restore_modules(model):
    """Undoes every replace_modules() on the model. Returns how many modules it changed back."""
    changed = 0
    for module in model.modules():
        original = _original_class(module)
        if original is not None:
            module.__class__ = original
            changed += 1
    return changed


def _wanted(include, exclude):
    names = [rule.name for rule in RULES]
    for name in [*(include or ()), *exclude]:
        if name not in names:
            raise ValueError(f"replace_modules: there is no rule {name!r}; the rules are {', '.join(names)}")
    return [rule for rule in RULES if (include is None or rule.name in include) and rule.name not in exclude]


def _dtype_and_device(module):
    for tensor in module.parameters():
        return tensor.dtype, tensor.device
    return torch.get_default_dtype(), torch.device("cpu")


# ---- the class

_classes = {}


def _original_class(module):
    return type(module).__dict__.get("_replaced_class")


def _fused_class(original, rule_name, choice):
    """The subclass of `original` whose forward is the rule's choice; one for all modules that are alike."""
    key = (original, rule_name, choice)
    if key not in _classes:
        forward = next(rule for rule in RULES if rule.name == rule_name).forwards[choice]
        _classes[key] = type("Fused" + original.__name__, (original,), {
            "forward": _where_tried(original, forward), "_replaced_class": original, "__doc__": f"{original.__name__} with a fused forward ({rule_name}).",
            # The class cannot be found by name: pickles and copies make it again.
            "__reduce_ex__": lambda self, protocol: (_rebuild, (original, rule_name, choice), self.__dict__),
        })
    return _classes[key]


def _where_tried(original, fused):
    """The fused forward for what the trial stands for: kernels for the device, a dtype they know, that of the weights. Else the module's own."""

    @functools.wraps(original.forward)
    def forward(self, input, *args, **kwargs):
        weight = next(self.parameters(), None)
        known = torch.is_tensor(input) and input.dtype in _KERNEL_DTYPES and has_kernels(input.device)
        if known and (weight is None or weight.dtype == input.dtype):
            return fused(self, input, *args, **kwargs)
        return original.forward(self, input, *args, **kwargs)

    return forward


def _rebuild(original, rule_name, choice):
    cls = _fused_class(original, rule_name, choice)
    return cls.__new__(cls)


# ---- the check

def _first_that_agrees(module, rule, candidates):
    """(the candidate whose forward agrees with the module's own, None) or (None, why none does)."""
    _, device = _dtype_and_device(module)
    devices = [] if device.type in ("meta", "cpu") else [device.index or 0]
    why = ""
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(0)
        twin = _twin(module)
        for choice in candidates:
            try:
                why = _difference(twin, rule, rule.forwards[choice])
            except (RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError) as error:  # of either forward: it is not ours to say
                why = f"the trial failed: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
            if not why:
                return choice, None
    return None, why


def _twin(module):
    """A module of the same class and settings with random weights of its own: the real ones may be sharded, or on the meta device. No hooks."""
    twin = module.__class__.__new__(module.__class__)
    twin.__dict__ = dict(module.__dict__)
    for registry, value in module.__dict__.items():
        if registry.endswith("_hooks"):
            twin.__dict__[registry] = type(value)()
    twin._parameters = {name: p if p is None else torch.nn.Parameter(_random(p.shape, p.dtype, p.device)) for name, p in module._parameters.items()}
    twin._modules = {name: child if child is None else _twin(child) for name, child in module._modules.items()}
    return twin


def _random(shape, dtype, device):
    return torch.randn(tuple(shape), device="cpu" if device.type == "meta" else device).to(dtype)


def _difference(twin, rule, fused_forward):
    """Why the two forwards do not agree; empty if they do."""
    dtype, device = _dtype_and_device(twin)
    inputs = [t.to(device, dtype) if t.is_floating_point() else t.to(device) for t in rule.sample(twin)]
    own, own_grads = _outcome(twin, type(twin).forward, inputs)
    fused, fused_grads = _outcome(twin, fused_forward, inputs)
    if own.shape != fused.shape or own.dtype != fused.dtype:
        return f"it gives {own.dtype}{list(own.shape)}, the fused operator {fused.dtype}{list(fused.shape)}"
    for what, a, b, ulps in [("output", own, fused, _OUTPUT_ULPS)] + [("gradient", *pair, _GRADIENT_ULPS) for pair in zip(own_grads, fused_grads)]:
        largest, apart = a.double().abs().max().item(), (a.double() - b.double()).abs().max().item()
        if not apart <= ulps * torch.finfo(a.dtype).eps * largest:
            return f"the {what} differs by {apart:.3g} where the largest value is {largest:.3g}"
    return ""


def _outcome(module, forward, inputs):
    """(output, gradients of the inputs and parameters) under one fixed gradient of the output."""
    inputs = [t.detach().clone().requires_grad_(t.is_floating_point()) for t in inputs]
    wanted = [t for t in inputs if t.requires_grad] + list(module.parameters())
    with torch.enable_grad():
        output = forward(module, *inputs)
        weights = torch.cos(torch.arange(output.numel(), device=output.device, dtype=torch.float32)).reshape(output.shape).to(output.dtype)
        return output.detach(), torch.autograd.grad(output, wanted, weights)
