# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from deepspeed.utils import (get_z3_leaf_modules, set_z3_leaf_module, set_z3_leaf_modules, set_z3_leaf_modules_by_name,
                             set_z3_leaf_modules_by_suffix, unset_z3_leaf_modules, z3_leaf_module, z3_leaf_parameter)


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU())
        self.out = torch.nn.Linear(2, 2)


@pytest.fixture
def model():
    return torch.nn.ModuleDict({"first": Block(), "second": Block()})


def test_by_class(model):
    found = set_z3_leaf_modules(model, [Block])
    assert found == [model["first"], model["second"]] == get_z3_leaf_modules(model)
    assert model["first"]._z3_leaf is True and z3_leaf_module(model["first"]) and not z3_leaf_module(model["first"].out)
    assert all(z3_leaf_parameter(parameter) for parameter in model.parameters())
    assert unset_z3_leaf_modules(model, [Block]) == found and get_z3_leaf_modules(model) == []
    assert not any(z3_leaf_parameter(parameter) for parameter in model.parameters())


@pytest.mark.parametrize("name", ["Block", f"{Block.__module__}.Block"])
def test_by_class_name(model, name):
    assert len(set_z3_leaf_modules(model, [name])) == 2


def test_a_subclass_is_another_class(model):
    class Special(Block):
        pass

    model["third"] = Special()
    assert len(set_z3_leaf_modules(model, [Block])) == 2


def test_not_found(model):
    with pytest.raises(ValueError, match="no module of class NoSuch in ModuleDict"):
        set_z3_leaf_modules(model, ["NoSuch"])
    assert set_z3_leaf_modules(model, ["NoSuch"], raise_if_not_found=False) == []
    with pytest.raises(TypeError, match="got 3"):
        set_z3_leaf_modules(model, [3])


def test_by_name_and_suffix(model):
    found, missing = set_z3_leaf_modules_by_name(model, ["first.mlp", "nowhere"], raise_if_not_found=False)
    assert found == [model["first"].mlp] and missing == ["nowhere"]
    with pytest.raises(ValueError, match="no module named 'nowhere'"):
        set_z3_leaf_modules_by_name(model, ["nowhere"])
    found, missing = set_z3_leaf_modules_by_suffix(model, ["mlp"])
    assert found == [model["first"].mlp, model["second"].mlp] and missing == []
    found, _ = set_z3_leaf_modules_by_suffix(model, ["lp"], raise_if_not_found=False)
    assert found == []  # a suffix is whole parts of the path
    set_z3_leaf_modules_by_name(model, ["first.mlp"], flag=False)
    assert get_z3_leaf_modules(model) == [model["second"].mlp]


def test_an_inner_mark_survives_the_outer(model):
    set_z3_leaf_modules_by_name(model, ["first", "first.out"])
    set_z3_leaf_modules_by_name(model, ["first"], flag=False)
    assert z3_leaf_parameter(model["first"].out.weight) and not z3_leaf_parameter(model["first"].mlp[0].weight)
    set_z3_leaf_module(model["second"], True)
    assert z3_leaf_module(model["second"])
