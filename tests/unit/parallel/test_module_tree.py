# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from deepspeed.utils import recursive_getattr, recursive_setattr


def test_reaching_in_and_replacing():
    model = torch.nn.Sequential(torch.nn.Linear(1, 2), torch.nn.ModuleDict({"x": torch.nn.ModuleList([torch.nn.Identity()])}))
    assert recursive_getattr(model, "0.weight") is model[0].weight and recursive_getattr(model, "1.x.0") is model[1]["x"][0]
    new = torch.nn.Linear(3, 3)
    recursive_setattr(model, "1.x.0", new)
    assert model[1]["x"][0] is new
    recursive_setattr(model, "0", new)
    assert model[0] is new
    with pytest.raises(AttributeError):
        recursive_getattr(model, "0.no_such")
