# SPDX-License-Identifier: Apache-2.0
"""Puts the fused operators into a model that somebody else wrote, after a numerical check, and takes them out again.

Note [Swapping the class]: a module is not exchanged, its class is: ``module.__class__`` becomes a subclass of what it was with another
``forward``. So the parameters, hooks, buffers, names in the state_dict and every reference to the module stay what they are, it works before and after
``deepspeed.initialize``, ``isinstance`` still holds, and undoing it restores the very same object.
"""
import functools
import math
from dataclasses import dataclass, field

import torch

from deepspeed.ops._base import has_kernels
from deepspeed.ops.replace_rules import CALLED, RULES

_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# What two correct implementations may differ by, in units of the dtype's rounding of the largest value: either rounds its result once (half
# a unit) and may round what lies between once or twice. Gradients pass through twice as many roundings.
_OUTPUT_ULPS, _GRADIENT_ULPS = 4, 8

# A clamp or a threshold of the module's own shows itself at one of these sizes of its input, or at none that matters.
_SIZES = (1.0, 0.01, 100.0)
_PERIOD = 65537    # of large random weights
_CHUNK = 1 << 16   # elements that are compared at a time: a trial should not need much more memory than the module

# What torch keeps in every module's __dict__: all else there is a setting of the module.
_TORCH_S_OWN = frozenset(torch.nn.Module().__dict__)
# What somebody's forward raises when it cannot take what a trial gives it; the module then stays as it is, and `refused` says why.
_REFUSALS = (RuntimeError, ValueError, TypeError, AttributeError)
_CALL_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


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

    Every kind of module is first tried on random input of several sizes and random weights of the module's dtype and device, in training and in
    evaluation: output and gradients must agree with the module's own to within a few roundings, else it stays as it is and `refused` says why.
    Of one kind are modules of one class with the same settings, that is all their attributes and their children's. Found are modules of torch.nn and of
    models in the style of Hugging Face (RMSNorm classes, `gate_proj/up_proj/down_proj` and `gate_up_proj/down_proj` MLPs, activation
    classes), not functions called inside somebody's `forward`.

    include, exclude: names of rules, of "layer_norm", "rms_norm", "activation", "gated_mlp", "softmax", "cross_entropy"; default: all.
    What was not tried goes the module's own way: input of another dtype than the weights, autocast of anything but float32, dtypes or devices without
    kernels, keyword or further arguments, a module whose settings or activation changed or whose activation got hooks since then.
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
            obstacle = _obstacle(module)
            if obstacle:
                replacement.refused[name] = f"{rule.name}: {obstacle}"
                break
            key = (rule.name, _kind(module))
            if key not in verdicts:
                verdicts[key] = _first_that_agrees(module, rule, candidates)
            choice, why = verdicts[key]
            if choice is None:
                replacement.refused[name] = f"{rule.name}: {why}"
            else:
                module.__dict__["_as_tried"] = _settings(module)
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
            module.__dict__.pop("_as_tried", None)
            changed += 1
    return changed


def _wanted(include, exclude):
    include, exclude = ([names] if isinstance(names, str) else names for names in (include, exclude))
    names = [rule.name for rule in RULES]
    for name in [*(include or ()), *exclude]:
        if name not in names:
            raise ValueError(f"replace_modules: there is no rule {name!r}; the rules are {', '.join(names)}")
    return [rule for rule in RULES if (include is None or rule.name in include) and rule.name not in exclude]


def _obstacle(module):
    """What a trial could not tell about the module; None: nothing."""
    if "forward" in module.__dict__:
        return "something has given this module a forward of its own"
    if any(True for _ in module.buffers()):
        return "it has buffers, whose values may change what it computes"
    if _is_watched(module):
        return "its activation has hooks or a forward of its own, which the fused operator would not call"
    return None


def _bypassed(module):
    """The children that the module's own forward calls and the fused one does not."""
    return [child for name, child in module._modules.items() if child is not None and name not in CALLED]


def _is_watched(module):
    return any("forward" in inner.__dict__ or any(inner.__dict__.get(hooks) for hooks in _CALL_HOOKS)
               for child in _bypassed(module) for inner in child.modules())


# ---- settings: what makes two modules of a class alike, and one module what it was

def _settings(module):
    """{name: value} of all that is the module's and no parameter, and the children that the fused forward does without."""
    plain = {name: value for name, value in module.__dict__.items() if name not in _TORCH_S_OWN and name != "_as_tried"}
    return plain | {name: child for name, child in module._modules.items() if child is not None and name not in CALLED}


def _is_as_tried(module):
    for name, tried in module._as_tried.items():
        now = module.__dict__[name] if name in module.__dict__ else module._modules.get(name)
        if now is not tried and not (type(now) is type(tried) and isinstance(now, (int, float)) and now == tried):
            return False
    return not module._modules or not _is_watched(module)


def _kind(module):
    """A key that two modules share only if they compute the same with the same weights."""
    own = tuple((name, _value_key(value)) for name, value in module.__dict__.items() if name not in _TORCH_S_OWN and name != "_as_tried")
    weights = tuple((name, p if p is None else (tuple(p.shape), p.dtype, p.device)) for name, p in module._parameters.items())
    children = tuple((name, child if child is None else _kind(child)) for name, child in module._modules.items())
    return type(module), own, weights, children


def _value_key(value):
    """Values that compare equal, of one type; what cannot be compared so is only like itself (the module keeps it alive, so its id stays its own)."""
    try:
        hash(value)
    except TypeError:
        return "id", id(value)
    return ("id", id(value)) if torch.is_tensor(value) else (type(value), value)


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
    """The fused forward for what the trial stands for. Else the module's own."""
    arity = fused.__code__.co_argcount - 1

    @functools.wraps(original.forward)
    def forward(self, *args, **kwargs):
        if not kwargs and len(args) == arity and _fits(self, args) and _is_as_tried(self):
            return fused(self, *args)
        return original.forward(self, *args, **kwargs)

    return forward


def _fits(module, args):
    """Tensors on a device with kernels, the first of a dtype that they know and that the weights have. Autocast leaves float32 as it is in what we replace."""
    if not all(torch.is_tensor(t) for t in args):
        return False
    x, weight = args[0], next(module.parameters(), None)
    if x.dtype not in _KERNEL_DTYPES or not has_kernels(x.device) or (weight is not None and weight.dtype != x.dtype):
        return False
    return x.dtype == torch.float32 or not torch.is_autocast_enabled(x.device.type)


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
            differs = _difference(_twin(module, sizes), rule, fused_forward)
        except _REFUSALS:  # tried again in its own widths, which then says what failed
            differs = "in smaller widths the trial failed"
        if not differs:
            return _difference(_twin(module).requires_grad_(False), rule, fused_forward, sizes=(1.0,))
    return _difference(_twin(module), rule, fused_forward)


def _twin(module, sizes=None, size=None):
    """A module of the same class and settings with random weights of its own: the real ones may be sharded, or on the meta device. No hooks.

    sizes: {child: (out_features, in_features)} of linear layers that get others than theirs; size: of this one."""
    twin = module.__class__.__new__(module.__class__)
    twin.__dict__ = dict(module.__dict__)
    for registry, value in module.__dict__.items():
        if registry.endswith("_hooks"):
            twin.__dict__[registry] = type(value)()
    twin._parameters = {name: p if p is None else torch.nn.Parameter(_random(p, (size or p.shape)[:p.dim()])) for name, p in module._parameters.items()}
    twin._modules = {name: child if child is None else _twin(child, size=(sizes or {}).get(name)) for name, child in module._modules.items()}
    if size:
        twin.out_features, twin.in_features = size
    return twin


def _random(p, shape):
    """Weights under which a linear layer's output is as large as its input: in float16 the product of two of them still has room. Those of a large one
    are repeated, with a period that no width divides: drawing each would take longer than the trial."""
    count, columns = math.prod(shape), shape[-1] if len(shape) > 1 else 1
    some = torch.randn(min(count, _PERIOD), dtype=p.dtype, device="cpu" if p.device.type == "meta" else p.device).mul_(columns ** -0.5)
    return (some.repeat(-(-count // _PERIOD))[:count] if count > _PERIOD else some).reshape(tuple(shape))


def _difference(twin, rule, fused_forward, sizes=_SIZES):
    """Why the two forwards do not agree, in training and evaluation and for input of each size; empty if they do. Gradients are those of the inputs
    and of the twin's parameters that require them."""
    dtype, device = _dtype_and_device(twin)
    samples = [t.to(device, dtype) if t.is_floating_point() else t.to(device) for t in rule.sample(twin)]
    for training in (True, False):
        twin.train(training)
        for size in sizes:
            why = _difference_at(twin, fused_forward, [t * size if t.is_floating_point() else t for t in samples], may_overflow=size > 1)
            if why:
                return f"{why} ({'training' if training else 'evaluation'}, input of size {size:g})"
    return ""


def _difference_at(twin, fused_forward, inputs, may_overflow):
    inputs = [t.requires_grad_(t.is_floating_point()) for t in inputs]
    with torch.enable_grad():
        state = _random_state(inputs[0].device)
        own = type(twin).forward(twin, *inputs)
        if not torch.equal(_random_state(inputs[0].device), state):
            return "it draws random numbers"
        fused = fused_forward(twin, *inputs)
    if own.shape != fused.shape or own.dtype != fused.dtype:
        return f"it gives {own.dtype}{list(own.shape)}, the fused operator {fused.dtype}{list(fused.shape)}"
    why = _apart("output", own.detach(), fused.detach(), _OUTPUT_ULPS, may_overflow)
    weights = torch.cos(torch.arange(own.numel(), device=own.device, dtype=torch.float32)).reshape(own.shape).to(own.dtype)
    for leaf in filter(lambda t: t.requires_grad, [*inputs, *twin.parameters()]):   # one by one: two gradients are alive at a time, not all twice
        if why:
            break
        pair = [torch.autograd.grad(output, leaf, weights, retain_graph=True)[0] for output in (own, fused)]
        why = _apart("gradient", *pair, _GRADIENT_ULPS, may_overflow)
    return why


def _random_state(device):
    return torch.get_rng_state() if device.type == "cpu" else torch.cat([torch.get_rng_state(), torch.get_device_module(device).get_rng_state(device)])


def _apart(what, own, fused, ulps, may_overflow):
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
