# SPDX-License-Identifier: Apache-2.0
"""Activations fused with what stands beside them: bias + GELU/SiLU/ReLU, gated activations, dropout + residual.

Everything takes float32, bfloat16 or float16 on the CPU or a GPU and computes in float32; results have the dtype of the input and are
contiguous. A bias has shape [d] and the dtype of the input or float32; its gradient is summed in float32 in an order that does not depend on
the number of threads. The backward passes recompute from the inputs: no intermediate tensor is kept. All of it works under
``torch.compile``. What does not fit (shape, dtype, device) raises ValueError naming the argument.
"""
import torch

from deepspeed.ops._library import check_given, ops

_GELU = {"none": "gelu", "tanh": "gelu_tanh"}


def _gelu(approximate):
    if approximate not in _GELU:
        raise ValueError(f"approximate must be 'none' (by erf) or 'tanh', not {approximate!r}")
    return _GELU[approximate]


def bias_gelu(x, bias=None, approximate="none"):
    """GELU(x + bias) of x [.., d] (Hendrycks and Gimpel 2016), by erf or, approximate="tanh", by its approximation."""
    return ops().bias_act(x, bias, _gelu(approximate))


def bias_silu(x, bias=None):
    """SiLU, x * sigmoid(x), of x + bias, x [.., d] (Elfwing et al. 2018)."""
    return ops().bias_act(x, bias, "silu")


def bias_relu(x, bias=None):
    """max(0, x + bias) of x [.., d]."""
    return ops().bias_act(x, bias, "relu")


def _gated(gate, up, bias, act):
    if up is None:
        return ops().gated_halves(gate, bias, act)
    if bias is not None:
        raise ValueError("bias goes with one tensor that holds both halves; add it to gate and up where they are made")
    return ops().gated(gate, up, act)


def swiglu(gate, up=None, bias=None):
    """silu(gate) * up (Shazeer, "GLU variants improve Transformer", 2020).

    gate, up: two tensors of one shape; or `gate` alone, [.., 2 d], whose first half is the gate and whose second is up, optionally plus `bias`
    [2 d]; the result is [.., d] then."""
    return _gated(gate, up, bias, "silu")


def geglu(gate, up=None, bias=None, approximate="none"):
    """gelu(gate) * up; arguments as in swiglu, `approximate` as in bias_gelu."""
    return _gated(gate, up, bias, _gelu(approximate))


def reglu(gate, up=None, bias=None):
    """max(0, gate) * up; arguments as in swiglu."""
    return _gated(gate, up, bias, "relu")


def dropout_add(x, residual, p=0.5, training=True, bias=None):
    """residual + dropout(x + bias, p): elements are dropped with probability p and the others scaled by 1 / (1 - p); in evaluation or with
    p = 0 the plain sum.

    x, residual: one shape [.., d]; bias: [d] or None. The random bits come from torch's generator of the device (torch.manual_seed repeats
    them, torch.utils.checkpoint recomputes with the same) by Philox 4x32-10; the mask is made again in the backward pass, not stored, and is
    the same for any number of threads. Under torch.vmap only randomness="same" is taken: one mask for all elements."""
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"p must lie in [0, 1], got {p}")
    check_given(x=x)
    if not training or p == 0.0:
        return ops().dropout_add(x, residual, bias, 0.0, torch.zeros(2, dtype=torch.int64, device=x.device))
    _check_one_mask()
    # Of an array of its own: torch.compile merges equal calls, seeded or not, and this one must not be.
    return ops().dropout_add(x, residual, bias, p, ops().philox_state(torch.empty(0, device=x.device)))


def _check_one_mask():
    """Under torch.vmap all elements get one mask, which is right for randomness="same" alone."""
    randomness = _other_randomness()
    if randomness:
        raise RuntimeError(f"dropout_add under vmap(randomness={randomness!r}): it has one mask for all elements. Pass randomness='same' if that is meant; "
                           "for a mask of each element's own call it on the whole batch, outside vmap")


@torch.compiler.assume_constant_result  # asked while torch.compile traces; it compiles anew where other transforms are around
def _other_randomness():
    """What a torch.vmap around this call was given as randomness, unless it is "same"."""
    functorch = torch._C._functorch
    for level in functorch.get_interpreter_stack() or ():
        if level.key() == functorch.TransformType.Vmap:
            randomness = functorch.CVmapInterpreterPtr(level).randomness()
            if randomness != functorch.RandomnessType.Same:
                return randomness.name.lower()
    return ""


class _FusedActivation(torch.nn.Module):
    """act(x + bias); the bias, [features], exists if `features` is given. It starts at zero."""

    def __init__(self, features=None, device=None, dtype=None):
        super().__init__()
        self.bias = None if features is None else torch.nn.Parameter(torch.zeros(features, device=device, dtype=dtype))

    def extra_repr(self):
        return "" if self.bias is None else f"features={self.bias.numel()}"


class FusedGELU(_FusedActivation):
    """bias_gelu as a module. features: size of a learnt bias, None for none; approximate: "none" or "tanh"."""

    def __init__(self, features=None, approximate="none", device=None, dtype=None):
        super().__init__(features, device, dtype)
        _gelu(approximate)
        self.approximate = approximate

    def forward(self, x):
        return bias_gelu(x, self.bias, self.approximate)

    def extra_repr(self):
        return ", ".join(filter(None, [super().extra_repr(), f"approximate={self.approximate!r}"]))


class FusedSiLU(_FusedActivation):
    """bias_silu as a module. features: size of a learnt bias, None for none."""

    def forward(self, x):
        return bias_silu(x, self.bias)


class FusedReLU(_FusedActivation):
    """bias_relu as a module. features: size of a learnt bias, None for none."""

    def forward(self, x):
        return bias_relu(x, self.bias)


class FusedSwiGLU(torch.nn.Module):
    """swiglu as a module: forward(gate, up), or forward(x) of a tensor with both halves."""

    def forward(self, gate, up=None):
        return swiglu(gate, up)


class FusedGeGLU(torch.nn.Module):
    """geglu as a module: forward(gate, up), or forward(x) of a tensor with both halves."""

    def __init__(self, approximate="none"):
        super().__init__()
        _gelu(approximate)
        self.approximate = approximate

    def forward(self, gate, up=None):
        return geglu(gate, up, approximate=self.approximate)

    def extra_repr(self):
        return f"approximate={self.approximate!r}"


class FusedReGLU(torch.nn.Module):
    """reglu as a module: forward(gate, up), or forward(x) of a tensor with both halves."""

    def forward(self, gate, up=None):
        return reglu(gate, up)


class FusedDropoutAdd(torch.nn.Module):
    """dropout_add as a module: forward(x, residual, bias=None); drops in training only."""

    def __init__(self, p=0.5):
        super().__init__()
        if not 0.0 <= p <= 1.0:
            raise ValueError(f"p must lie in [0, 1], got {p}")
        self.p = p

    def forward(self, x, residual, bias=None):
        return dropout_add(x, residual, self.p, self.training, bias)

    def extra_repr(self):
        return f"p={self.p}"
