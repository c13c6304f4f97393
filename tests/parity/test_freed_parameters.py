# SPDX-License-Identifier: Apache-2.0
"""What is freed says so: whoever reads, copies, converts or saves a sharded parameter gets an error that names it, or what needs no values."""
import copy
import io
import pickle

import numpy
import pytest
import torch
import torch.distributed as dist
from torch import nn

import deepspeed
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.zero import GatheredParameters
from tests.parity.launch import on_ranks
from tests.parity.test_gathered import freed, sharded, values
from tests.parity.tiny import assert_same, config, engine_of, tiny, train, whole


_TOUCHES = {
    "add": lambda p: p + 1, "matmul": lambda p: torch.ones(1, 1) @ p, "in place": lambda p: p.detach().add_(1), "clone": lambda p: p.clone(),
    "item": lambda p: p.sum().item(), "numpy": lambda p: p.detach().numpy(), "tolist": lambda p: p.tolist(), "index": lambda p: p[0],
    "iterate": lambda p: list(p), "cat": lambda p: torch.cat([p, p]), "copy out": lambda p: torch.zeros(1, 9).copy_(p),
    "to": lambda p: p.to(torch.float64), "view": lambda p: p.view(-1).sum(), "save": lambda p: pickle.dumps(p), "deepcopy": copy.deepcopy,
    "pointer": lambda p: p.data_ptr(), "equal": lambda p: torch.equal(p, torch.zeros(1, 9)), "storage": lambda p: bytes(p.untyped_storage()),
    "linear": lambda p: nn.functional.linear(torch.ones(1, 9), p), "float": lambda p: float(p[0, 0]), "init": lambda p: nn.init.zeros_(p),
    "assign data": lambda p: setattr(p, "data", torch.zeros(1, 9)), "share": lambda p: p.share_memory_(), "array": lambda p: __import__("numpy").asarray(p),
}


@on_ranks(2)
def test_touching_a_freed_parameter_is_an_error_that_names_it():
    model = sharded().module
    quiet = []
    for what, touch in _TOUCHES.items():
        try:
            with torch.no_grad():
                touch(model.head.weight)
            quiet.append(what)
        except RuntimeError as error:
            assert "head.weight" in str(error), (what, error)
    assert quiet == [], f"no error from: {quiet}"
    assert freed(model)
    assert_same(whole(model), values(tiny()))


@on_ranks(2)
def test_conversions_to_what_a_freed_parameter_is_give_it_back():
    weight = sharded().module.head.weight
    for same in (weight.float(), weight.cpu(), weight.to("cpu"), weight.to(torch.float32), weight.to(torch.device("cpu", dist.get_rank()), torch.float32)):
        assert same is weight
    assert weight.ds_status == ZeroParamStatus.NOT_AVAILABLE


@on_ranks(2)
def test_new_tensors_like_a_freed_parameter_need_no_values():
    weight = sharded().module.head.weight
    for source in (weight, weight.detach()):
        for made in (torch.zeros_like(source), torch.full_like(source, 2.0, dtype=torch.bfloat16), torch.empty_like(source), source.new_ones(1, 9)):
            assert type(made) is torch.Tensor and made.shape == (1, 9) and made.untyped_storage().nbytes() == made.nbytes
    assert not weight.new_zeros(3).any() and (torch.ones_like(weight) == 1).all()
    assert weight.ds_status == ZeroParamStatus.NOT_AVAILABLE


@on_ranks(2)
def test_an_optimizer_that_makes_its_state_at_once():
    """torch.optim.Adagrad, of weights that are sharded already."""
    found = []
    for stage in (0, 3):
        cfg = config(stage, optimizer=None, zero_allow_untested_optimizer=True)
        with deepspeed.zero.Init(config_dict_or_path=cfg, enabled=stage == 3):
            model = tiny()
        engine = engine_of(model, cfg, optimizer=torch.optim.Adagrad(model.parameters(), lr=0.1))
        train(engine, 3)
        found.append(whole(model))
        engine.destroy()
    assert_same(*found)


@on_ranks(2)
def test_printing_is_no_access():
    model = sharded().module
    assert "head.weight" in repr(model.head.weight) and "head.weight" in str(model.head.weight) and "head.weight" in f"{model.head.weight}"
    assert "Linear" in repr(model)
    assert model.head.weight.data.shape[0] == 0 and model.head.weight.data.numel() == 0
    assert model.head.weight.requires_grad and model.head.weight.dtype == torch.float32 and model.head.weight.dim() == 2


@on_ranks(2)
def test_copies_of_a_sharded_model_are_refused():
    engine = sharded()
    for action in (copy.deepcopy, pickle.dumps):
        with pytest.raises(RuntimeError, match="GatheredParameters"):
            action(engine.module)
    with GatheredParameters(engine.module.parameters()):
        twin = copy.deepcopy(engine.module.head.weight)
    assert torch.equal(twin, tiny().head.weight)
    train(engine, 1)


@on_ranks(2)
def test_state_dict_of_sharded_parameters_answers_shapes_and_takes_values_when_they_are_there():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        with deepspeed.zero.Init():
            model = nn.Linear(5, 3)
    state = model.state_dict()
    assert {name: (tuple(t.shape), t.dtype) for name, t in state.items()} == {"weight": ((3, 5), torch.float32), "bias": ((3,), torch.float32)}
    assert not isinstance(state["weight"], nn.Parameter) and not state["weight"].requires_grad
    with pytest.raises(RuntimeError, match="clone.*'weight'.*sharded by ZeRO-3"):
        state["weight"].clone()
    with pytest.raises(RuntimeError, match="sharded by ZeRO-3"):
        pickle.dumps(state["weight"])
    with deepspeed.zero.GatheredParameters([model.weight]):
        assert torch.equal(state["weight"].clone(), model.weight) and torch.equal(torch.stack([state["weight"]])[0], model.weight)
    with pytest.raises(RuntimeError, match="sharded by ZeRO-3"):
        state["weight"] + 1


NO_HASHING = {
    "array": numpy.asarray, "copy": numpy.array, "sum": lambda a: a.sum(), "shape": lambda a: a.shape, "index": lambda a: a[0], "len": len,
    "add": lambda a: a + 1, "add to": lambda a: numpy.ones(3) + a, "equal": lambda a: a == 1, "save": lambda a: numpy.save(io.BytesIO(), a),
    "pickle": pickle.dumps, "deepcopy": copy.deepcopy, "ufunc": numpy.exp, "concatenate": lambda a: numpy.concatenate([a, a]), "loop": list,
    "truth": bool, "float": float, "set": lambda a: setattr(a, "flags", 1), "stack": lambda a: numpy.stack([a]),
}


@on_ranks(2)
def test_entries_of_a_sharded_state_dict_convert_and_hash_on_one_rank_alone():
    """TRL tells reference models apart by hashing a state_dict()."""
    with deepspeed.zero.Init():
        model = nn.Linear(50, 3)
    weight = model.weight
    with GatheredParameters([weight]):
        expected = weight.detach().clone()
    dist.barrier()
    if dist.get_rank() == 1:   # no collective
        entry = model.state_dict()["weight"]
        half = entry.to(torch.float64, copy=True).bfloat16()
        assert (half.shape, half.dtype, entry.dtype) == (weight.shape, torch.bfloat16, torch.float32)
        assert half.detach().dtype == torch.bfloat16
        wide = half.float().numpy()
        mine = weight.ds_tensor.numel()
        assert 0 < mine < entry.numel() and wide.tobytes() == expected.flatten()[-mine:].bfloat16().float().numpy().tobytes()
        for use in NO_HASHING.values():
            with pytest.raises(RuntimeError, match="numpy.*'weight'.*sharded by ZeRO-3"):
                use(wide)
        with pytest.raises(RuntimeError, match="clone.*'weight'.*sharded by ZeRO-3"):
            half.clone()
        with pytest.raises(RuntimeError, match="sharded by ZeRO-3"):
            pickle.dumps(half)
    half = model.state_dict()["weight"].bfloat16()
    with GatheredParameters([weight]):
        assert torch.equal(half.clone(), expected.bfloat16()) and half.shape == half.float().numpy().shape
    with pytest.raises(RuntimeError, match="numpy.*'weight'.*sharded by ZeRO-3"):
        weight.numpy()


@on_ranks(2)
def test_converting_an_entry_of_a_sharded_state_dict_takes_no_memory():
    with deepspeed.zero.Init():
        model = nn.Linear(700, 300, bias=False)
    entry = model.state_dict()["weight"]
    for made in (entry.double(), entry.bfloat16().float().half()):
        with torch._C.DisableTorchFunctionSubclass():
            assert made.untyped_storage().nbytes() == 0 and (made.shape, made.stride()) == ((300, 700), (700, 1))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        entry.double()
    assert sum(max(0, event.self_cpu_memory_usage) for event in profile.events()) < 1024


@on_ranks(2)
def test_setting_the_data_that_a_freed_parameter_shows_changes_nothing():
    """Libraries pad biases of heads by nothing."""
    model = sharded().module
    wanted = whole(model)
    for parameter in model.parameters():
        if parameter.ds_status == ZeroParamStatus.NOT_AVAILABLE:
            parameter.data = nn.functional.pad(parameter.data, (0, 0))
    assert_same(wanted, whole(model))
