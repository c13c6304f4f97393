# SPDX-License-Identifier: Apache-2.0
import random
from collections import OrderedDict, namedtuple

import numpy
import pytest
import torch

import deepspeed
from deepspeed.device import copy_to_device, move_to_device, set_random_seed


def test_on_device():
    with deepspeed.OnDevice(dtype=torch.bfloat16, device="meta"):
        layer = torch.nn.Linear(3, 4)
        explicit = torch.zeros(2, device="cpu", dtype=torch.float64)
        numbers = torch.arange(3)
    assert layer.weight.device.type == layer.bias.device.type == "meta" and layer.weight.dtype == torch.bfloat16
    assert explicit.device.type == "cpu" and explicit.dtype == torch.float64 and numbers.dtype == torch.int64
    outside = torch.ones(1)
    assert outside.device.type == "cpu" and outside.dtype == torch.float32


def test_on_device_disabled_nested_and_with_an_error():
    with deepspeed.OnDevice(dtype=torch.float16, enabled=False):
        assert torch.ones(1).dtype == torch.float32
    context = deepspeed.OnDevice(dtype=torch.float16, device="meta")
    with pytest.raises(KeyError):
        with context:
            with context:
                assert torch.ones(1).is_meta
            with deepspeed.OnDevice(dtype=torch.float64, device="cpu"):
                assert not torch.ones(1).is_meta and torch.ones(1).dtype == torch.float64
            assert torch.ones(1).is_meta and torch.ones(1).dtype == torch.float16
            raise KeyError
    assert torch.get_default_dtype() == torch.float32 and not torch.ones(1).is_meta
    with pytest.raises(ValueError, match="floating type"):
        deepspeed.OnDevice(dtype=torch.int32)


Pair = namedtuple("Pair", "x y")


def test_move_keeps_structure_and_types():
    item = OrderedDict(a=[torch.ones(2), 3], b=(torch.zeros(1), "text", None), c=Pair(torch.ones(1), 1))
    moved = move_to_device(item, "meta")
    assert type(moved) is OrderedDict and type(moved["c"]) is Pair and type(moved["b"]) is tuple
    assert moved["a"][0].is_meta and moved["b"][0].is_meta and moved["c"].x.is_meta
    assert moved["a"][1] == 3 and moved["b"][1:] == ("text", None)
    only_big = move_to_device(item, "meta", criterion_func=lambda leaf: torch.is_tensor(leaf) and leaf.numel() > 1)
    assert only_big["a"][0].is_meta and not only_big["b"][0].is_meta


def test_copy_is_a_copy():
    source = [torch.ones(2), torch.zeros(2), "x"]
    copies = copy_to_device(source, "cpu", lambda leaf: torch.is_tensor(leaf) and bool(leaf.sum()))
    assert copies[0].data_ptr() != source[0].data_ptr() and copies[1] is source[1] and copies[2] == "x"


def test_seed():
    draws = []
    for _ in range(2):
        set_random_seed(11)
        draws.append((random.random(), float(numpy.random.rand()), float(torch.rand(1))))
    assert draws[0] == draws[1]
