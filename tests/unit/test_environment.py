# SPDX-License-Identifier: Apache-2.0
import pytest

from deepspeed._environment import VARIABLES, BadVariable, read


def test_unset_and_empty_give_the_default():
    assert read("DEEPSPEED_TIMEOUT", {}) == 10 and read("RANK", {"RANK": ""}) is None


def test_converts():
    assert read("RANK", {"RANK": "3"}) == 3 and read("DS_ACCELERATOR", {"DS_ACCELERATOR": "cpu"}) == "cpu"


def test_bad_value_names_variable_and_value():
    with pytest.raises(BadVariable, match="LOCAL_RANK='two' is not an integer"):
        read("LOCAL_RANK", {"LOCAL_RANK": "two"})


def test_every_variable_says_what_it_is():
    assert all(variable.meaning for variable in VARIABLES.values())
