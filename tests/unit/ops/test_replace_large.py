# SPDX-License-Identifier: Apache-2.0
"""replace_modules() tries large MLPs in smaller widths first: what is caught there and in their own widths, and what that costs."""
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from deepspeed.ops import replace_modules
from deepspeed.ops.replace_rules import RULES
from deepspeed.ops.replace_trial import disagreement, random_twin

HIDDEN, INNER = 1027, 2048


class Products(TorchDispatchMode):
    """Counts the products of matrix multiplications."""
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            a, b = args[-2:]
            self.count += a.shape[0] * a.shape[1] * b.shape[1]
        return func(*args, **(kwargs or {}))


class WideMLP(torch.nn.Module):
    """What `oddity` names is done to one of the steps."""

    def __init__(self, oddity="", act_fn=None, bias=False):
        super().__init__()
        self.gate_proj, self.up_proj = (torch.nn.Linear(HIDDEN, INNER, bias=bias) for _ in range(2))
        self.down_proj = torch.nn.Linear(INNER, HIDDEN, bias=bias)
        self.act_fn, self.oddity, self.width = act_fn or torch.nn.SiLU(), oddity, INNER

    def forward(self, x):
        gate, up = self.gate_proj(x), self.up_proj(x)
        if self.oddity == "asks for its width":
            gate = gate.reshape(-1, self.width)
        if self.oddity == "half of its width":  # all of it where it is narrower
            gate = torch.cat([gate[:, :self.width // 2], 2 * gate[:, self.width // 2:]], 1)
        if self.oddity == "clamps what is wide in training" and self.training and gate.shape[-1] == self.width:
            gate = gate.clamp(-1e-3, 1e-3)
        if self.oddity == "hides a weight in evaluation" and not self.training:
            up = torch.nn.functional.linear(x, self.up_proj.weight.detach())
        if self.oddity == "clamps what is large":
            up = up.clamp(-90, 90)
        if self.oddity == "detaches where wide" and gate.shape[-1] == self.width:
            gate = gate.detach()
        return self.down_proj(self.act_fn(gate) * up)


@pytest.mark.parametrize("oddity", ["half of its width", "clamps what is wide in training", "hides a weight in evaluation", "clamps what is large",
                                    "detaches where wide"])
def test_what_computes_something_else_stays(oddity):
    module = WideMLP(oddity)
    assert "" not in replace_modules(module).replaced and type(module) is WideMLP


@pytest.mark.parametrize("module", [WideMLP(), WideMLP(bias=True), WideMLP("asks for its width"), WideMLP(act_fn=torch.nn.GELU(approximate="tanh"))])
def test_what_computes_the_same_is_replaced(module):
    shapes = {name: p.shape for name, p in module.named_parameters()}
    assert replace_modules(module).replaced[""] == "gated_mlp"
    assert shapes == {name: p.shape for name, p in module.named_parameters()} and module.gate_proj.out_features == INNER


def test_a_trial_costs_a_quarter_of_one_in_its_own_widths():
    rule = next(rule for rule in RULES if rule.name == "gated_mlp")
    with Products() as whole:
        assert not disagreement(random_twin(WideMLP()), rule, rule.forwards["swiglu"])
    with Products() as ours:
        assert replace_modules(WideMLP()).replaced[""] == "gated_mlp"
    assert ours.count > 0 and 4 * ours.count < whole.count  # and hardly any comparing, which took as long
