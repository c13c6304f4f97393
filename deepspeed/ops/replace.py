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
from deepspeed.ops.replace_rules import CALLED, RULES
from deepspeed.ops.replace_trial import first_that_agrees

_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# What torch keeps in every module's __dict__: all else there is a setting of the module.
_TORCH_S_OWN = frozenset(torch.nn.Module().__dict__)
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
    Weights, their names and hooks are untouched. On a compiled module it must be called before torch.compile. torch.jit.trace keeps the fused operators,
    torch.jit.script refuses them.
    """
    wanted = _wanted(include, exclude)
    replacement, verdicts = Replacement(model), {}
    for name, module in model.named_modules():
        if _original_class(module) is not None:
            continue
        rule, candidates = _first_rule(wanted, module)
        if rule is None:
            continue
        choice, why = None, _obstacle(module)
        if not why:
            key = (rule.name, _kind(module))
            if key not in verdicts:
                verdicts[key] = first_that_agrees(module, rule, candidates)
            choice, why = verdicts[key]
        if choice is None:
            replacement.refused[name] = f"{rule.name}: {why}"
        else:
            module.__dict__["_as_tried"] = _settings(module)
            module.__class__ = _fused_class(type(module), rule.name, choice)
            replacement.replaced[name] = rule.name
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


def _first_rule(rules, module):
    """The first rule that may fit the module, with its candidates."""
    for rule in rules:
        candidates = rule.candidates(module)
        if candidates:
            return rule, candidates
    return None, ()


def _obstacle(module):
    """What a trial could not tell about the module; None: nothing."""
    if "forward" in module.__dict__:
        return "something has given this module a forward of its own"
    if any(True for _ in module.buffers()):
        return "it has buffers, whose values may change what it computes"
    if _is_watched(module):
        return "its activation has hooks or a forward of its own, which the fused operator would not call"
    return None


def _is_watched(module):
    return any("forward" in inner.__dict__ or any(inner.__dict__.get(hooks) for hooks in _CALL_HOOKS)
               for child in _bypassed(module).values() for inner in child.modules())


def _bypassed(module):
    """{name: child} of those that the module's own forward calls and the fused one does not."""
    return {name: child for name, child in module._modules.items() if child is not None and name not in CALLED}


# ---- settings: what makes two modules of a class alike, and one module what it was

def _settings(module):
    """{name: value} of all that is the module's and no parameter, and the children that the fused forward does without."""
    return _attributes(module) | _bypassed(module)


def _attributes(module):
    return {name: value for name, value in module.__dict__.items() if name not in _TORCH_S_OWN and name != "_as_tried"}


def _is_as_tried(module):
    for name, tried in module._as_tried.items():
        now = module.__dict__[name] if name in module.__dict__ else module._modules.get(name)
        if now is not tried and not _is_equal(now, tried):
            return False
    return not module._modules or not _is_watched(module)


def _is_equal(now, tried):
    """Numbers, and tuples of them, of which torch.export leaves copies."""
    if type(now) is not type(tried):
        return False
    if isinstance(now, tuple):
        return len(now) == len(tried) and all(map(_is_equal, now, tried))
    return isinstance(now, (int, float)) and now == tried


def _kind(module):
    """A key that two modules share only if they compute the same with the same weights."""
    own = tuple((name, _value_key(value)) for name, value in _attributes(module).items())
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
            "__prepare_scriptable__": _refuse_script,
        })
    return _classes[key]


def _refuse_script(module):
    """torch.jit.script calls this. It reads source text, and would find the own forward's with names that it cannot resolve."""
    raise RuntimeError(f"torch.jit.script cannot compile the fused forward of {type(module).__name__}: call deepspeed.ops.restore_modules(model) "
                       "first, or use torch.jit.trace, torch.export or torch.compile, which keep it")


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
