# SPDX-License-Identifier: Apache-2.0
"""Which modules replace_modules() knows: how each is recognised, with which settings it is tried, and what its forward becomes."""
from dataclasses import dataclass

import torch

from deepspeed.ops import activations, cross_entropy, normalization, softmax


@dataclass(frozen=True)
class Rule:
    """forwards: {candidate: forward(self, ...)}. candidates(module): which of them may fit, best guess first; none: the rule does not apply.
    sample(module): random inputs, as many as the forward takes. smaller(module): {child: (out_features, in_features)} of linear layers for a first trial of a
    large module, or nothing."""
    name: str
    forwards: dict
    candidates: object
    sample: object
    smaller: object = lambda module: {}


# The children that a fused forward calls as the module's own does, hooks and all; it does without the others.
_APART, _JOINED = ("gate_proj", "up_proj", "down_proj"), ("gate_up_proj", "down_proj")
CALLED = frozenset(_APART + _JOINED)


# ---- norms

def _layer_norm(self, input):
    return normalization.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


def _torch_rms_norm(self, x):
    eps = torch.finfo(torch.float32).eps if self.eps is None else self.eps   # torch's default is that of the dtype it computes in
    return normalization.rms_norm(x, self.weight, eps)


def _hf_eps(module):
    eps = getattr(module, "variance_epsilon", None)
    return getattr(module, "eps", None) if eps is None else eps


def _hf_rms_norm(self, hidden_states):
    return normalization.rms_norm(hidden_states, self.weight, _hf_eps(self))


def _hf_rms_norm_from_one(self, hidden_states):
    return normalization.rms_norm(hidden_states, self.weight, _hf_eps(self), weight_offset=1.0)


def _rms_norm_candidates(module):
    if type(module) is torch.nn.RMSNorm:
        return ["torch"] if len(module.normalized_shape) == 1 and module.weight is not None else []
    named = type(module).__name__.endswith("RMSNorm") or hasattr(module, "variance_epsilon")   # T5 calls its own a LayerNorm
    alike = (named and list(module._parameters) == ["weight"] and not module._modules
             and isinstance(_hf_eps(module), float) and module.weight is not None and module.weight.dim() == 1)
    return ["weight", "one plus weight"] if alike else []


# ---- activations

_GELU = {"GELU", "GELUActivation", "PytorchGELUTanh", "GELUTanh", "NewGELUActivation", "FastGELUActivation"}
_SILU = {"SiLU", "SiLUActivation"}


def _activation_candidates(module):
    name = type(module).__name__
    if list(module.parameters()) or getattr(module, "inplace", False):
        return []
    return ["gelu", "gelu_tanh"] if name in _GELU else ["silu"] if name in _SILU else []


# ---- MLPs with a gate

def _gated(activation):
    def forward(self, x):
        return self.down_proj(activation(self.gate_proj(x), self.up_proj(x)))
    return forward


def _gated_halves(activation):
    """With both projections in one linear layer, as in Phi-3."""
    def forward(self, x):
        return self.down_proj(activation(self.gate_up_proj(x)))
    return forward


def _geglu_tanh(*inputs):
    return activations.geglu(*inputs, approximate="tanh")


def _smaller_mlp(module):
    """A trial by widths that are as the module's modulo 64: of large MLPs nearly all time goes to matrix products that both forwards share."""
    joined = "gate_up_proj" in module._modules
    inner, hidden = (module.down_proj.in_features, module.gate_up_proj.in_features) if joined else module.gate_proj.weight.shape
    if hidden * inner <= 1 << 18:
        return {}
    hidden, inner = (min(n, 256 + n % 64) for n in (hidden, inner))
    into = {"gate_up_proj": (2 * inner, hidden)} if joined else {"gate_proj": (inner, hidden), "up_proj": (inner, hidden)}
    return {**into, "down_proj": (hidden, inner)}


def _gated_mlp_candidates(module):
    children = {name: child for name, child in module._modules.items() if child is not None}
    for linear, ending in ((_APART, ""), (_JOINED, " of halves")):
        activation = {"act_fn", "activation_fn"} & {*children, *module.__dict__}
        if all(type(children.get(name)) is torch.nn.Linear for name in linear) and not set(children) - {*linear, *activation} and activation:
            return [name + ending for name in ("swiglu", "geglu", "geglu_tanh")]
    return []


# ---- softmax and loss

def _softmax(self, input):
    if input.dim() == 0:
        return torch.nn.Softmax.forward(self, input)
    return softmax.scaled_masked_softmax(input)


def _cross_entropy(self, input, target):
    # Classes in the second dimension, probabilities, bytes as labels, weights set later: not what the fused one computes.
    if input.dim() != 2 or target.dtype != torch.int64 or self.weight is not None:
        return torch.nn.CrossEntropyLoss.forward(self, input, target)
    return cross_entropy.cross_entropy(input, target, ignore_index=self.ignore_index, label_smoothing=self.label_smoothing,
                                       reduction=self.reduction)


def _rows(*columns):
    """Seven rows, an odd number that no vector length divides."""
    return torch.randn(7, *columns, device="cpu")


RULES = (
    Rule("layer_norm", {"torch": _layer_norm},
         candidates=lambda m: ["torch"] if type(m) is torch.nn.LayerNorm else [],
         sample=lambda m: [_rows(*m.normalized_shape)]),
    Rule("rms_norm", {"torch": _torch_rms_norm, "weight": _hf_rms_norm, "one plus weight": _hf_rms_norm_from_one},
         candidates=_rms_norm_candidates,
         sample=lambda m: [_rows(*m.weight.shape)]),
    Rule("gated_mlp", {"swiglu": _gated(activations.swiglu), "geglu": _gated(activations.geglu),
                       "geglu_tanh": _gated(_geglu_tanh), "swiglu of halves": _gated_halves(activations.swiglu),
                       "geglu of halves": _gated_halves(activations.geglu), "geglu_tanh of halves": _gated_halves(_geglu_tanh)},
         candidates=_gated_mlp_candidates, smaller=_smaller_mlp,
         sample=lambda m: [_rows((m._modules.get("gate_up_proj") or m.gate_proj).in_features)]),
    Rule("activation", {"gelu": lambda self, input: activations.bias_gelu(input),
                        "gelu_tanh": lambda self, input: activations.bias_gelu(input, approximate="tanh"),
                        "silu": lambda self, input: activations.bias_silu(input)},
         candidates=_activation_candidates,
         sample=lambda m: [_rows(67)]),
    Rule("softmax", {"torch": _softmax},
         candidates=lambda m: ["torch"] if type(m) is torch.nn.Softmax and m.dim == -1 else [],
         sample=lambda m: [_rows(67)]),
    Rule("cross_entropy", {"torch": _cross_entropy},
         candidates=lambda m: ["torch"] if type(m) is torch.nn.CrossEntropyLoss and m.weight is None else [],
         sample=lambda m: [_rows(67), torch.randint(67, (7,), device="cpu")]),
)
