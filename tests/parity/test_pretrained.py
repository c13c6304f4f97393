# SPDX-License-Identifier: Apache-2.0
"""load_pretrained_shards: every kind of model, every kind of file, only the bytes that are kept."""
import errno
import json
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

import deepspeed
from deepspeed._native import core
from deepspeed.checkpoint import CheckpointError
from deepspeed.utils import safe_get_full_fp32_param
from tests.parity.launch import on_ranks
from tests.parity.tiny import Tiny, assert_same, config, engine_of, tiny, train, whole

NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64"}


def save(path, state):
    core().save_safetensors(str(path), {name: (NAMES[t.dtype], list(t.shape), t.contiguous().view(torch.uint8).numpy() if t.dim() else t.reshape(1).numpy())
                                        for name, t in state.items()})


def save_sharded(folder, state, files=3):
    weight_map = {}
    for number in range(files):
        part = dict(list(state.items())[number::files])
        name = f"model-{number + 1:05d}-of-{files:05d}.safetensors"
        save(folder / name, part)
        weight_map.update(dict.fromkeys(part, name))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def pretrained(folder, seed=11, dtype=torch.float32, files=3):
    """Files of a Tiny of another seed, written by rank 0; its state_dict."""
    state = {name: value.to(dtype) for name, value in tiny(seed).state_dict().items()}
    state["seen"] = torch.tensor(7.0)
    if dist.get_rank() == 0:
        save_sharded(folder, state, files) if files > 1 else save(folder / "model.safetensors", state)
    dist.barrier()
    return state


def check(model, state, dtype=torch.float32):
    wanted = {name: value.to(dtype) for name, value in state.items() if name != "seen"}
    assert_same({name: value.cpu() for name, value in whole(model).items()}, wanted)
    assert model.seen.item() == 7.0


def init_model(**arguments):
    with deepspeed.zero.Init(**arguments):
        return Tiny()


@pytest.fixture
def folder(tmp_path):
    return tmp_path


@on_ranks(3)
@pytest.mark.parametrize("files", [1, 3])
@pytest.mark.parametrize("stored, wanted", [(torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_sharded_models(folder, files, stored, wanted):
    state = pretrained(folder, dtype=stored, files=files)
    model = init_model(dtype=wanted)
    report = deepspeed.load_pretrained_shards(model, folder)
    assert report == ([], [], [])
    check(model, state, wanted)


@on_ranks(2)
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_engines_train_on_from_what_was_loaded(folder, stage):
    state = pretrained(folder)
    loaded, given = engine_of(tiny(), config(stage, bf16={"enabled": True})), tiny(11)
    deepspeed.load_pretrained_shards(loaded, folder)
    check(loaded.module, state, torch.bfloat16)
    for name, parameter in loaded.module.named_parameters():
        assert torch.equal(safe_get_full_fp32_param(parameter).cpu(), state[name].bfloat16().float()) or \
            torch.equal(safe_get_full_fp32_param(parameter).cpu(), state[name]), name
    before = train(loaded, 1)
    plain = engine_of(given, config(stage, bf16={"enabled": True}))
    plain.module.seen.fill_(7)
    assert train(plain, 1) == before


@on_ranks(2)
def test_init_then_initialize(folder):
    pretrained(folder)
    model = init_model()
    deepspeed.load_pretrained_shards(model, str(folder))
    assert train(engine_of(model, config(3))) == train(engine_of(tiny(11), config(3)))


@on_ranks(2)
def test_open_parameters_see_the_new_values(folder):
    state = pretrained(folder)
    model = init_model()
    with deepspeed.zero.GatheredParameters(list(model.head.parameters())):
        deepspeed.load_pretrained_shards(model, folder)
        assert torch.equal(model.head.weight.detach(), state["head.weight"])
    check(model, state)


@on_ranks(2)
def test_only_owned_bytes_are_read(folder):
    with deepspeed.zero.Init():
        model = nn.Linear(1000, 1000)
    if dist.get_rank() == 0:
        save(folder / "model.safetensors", {name: torch.randn(p.shape) for name, p in (("weight", model.weight), ("bias", model.bias))})
    dist.barrier()
    done = []
    read, os.preadv = os.preadv, lambda *arguments: done.append(read(*arguments)) or done[-1]
    try:
        deepspeed.load_pretrained_shards(model, folder)
    finally:
        os.preadv = read
    kept = sum(p.ds_tensor.numel() * 4 for p in model.parameters())
    assert kept - 1000 <= sum(done) <= kept < 2_100_000


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 5)
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.embed.weight


@on_ranks(2)
@pytest.mark.parametrize("stored", ["embed.weight", "head.weight"])
@pytest.mark.parametrize("sharded", [True, False])
def test_tied_weights_under_either_name(folder, stored, sharded):
    with deepspeed.zero.Init(enabled=sharded):
        model = Tied()
    value = torch.arange(35.0).reshape(7, 5)
    if dist.get_rank() == 0:
        save(folder / "model.safetensors", {stored: value})
    dist.barrier()
    assert deepspeed.load_pretrained_shards(model, folder) == ([], [], [])
    assert torch.equal(whole(model)["embed.weight"], value) and model.head.weight is model.embed.weight


@on_ranks(2)
def test_what_does_not_fit(folder):
    state = pretrained(folder)
    if dist.get_rank() == 0:
        save_sharded(folder, {**{name: value for name, value in state.items() if name != "head.bias"}, "head.weight": torch.ones(2, 9), "extra": torch.ones(1)})
    dist.barrier()
    model = init_model()
    before = whole(model)
    with pytest.raises(CheckpointError) as refused:
        deepspeed.load_pretrained_shards(model, folder)
    for words in ("'head.bias' is in the model, not in the files", "'head.weight' has shape [1, 9] in the model and [2, 9] in the files",
                  "'extra' is in the files, not in the model"):
        assert words in str(refused.value)
    assert_same(whole(model), before)
    report = deepspeed.load_pretrained_shards(model, folder, strict=False)
    assert report == (["head.bias"], ["extra"], [("head.weight", (1, 9), (2, 9))])
    after = whole(model)
    assert torch.equal(after["head.bias"], before["head.bias"]) and torch.equal(after["layers.0.norm.weight"], state["layers.0.norm.weight"])


@on_ranks(1)
def test_plain_models_and_torch_files(folder):
    state = {**tiny(11).state_dict(), "seen": torch.tensor(7.0)}
    torch.save(state, folder / "pytorch_model.bin")
    model = tiny()
    model.layers[0].linear.weight = nn.Parameter(model.layers[0].linear.weight.detach().t().contiguous().t())   # other strides
    deepspeed.load_pretrained_shards(model, folder)
    check(model, state)
    model = tiny().bfloat16()
    deepspeed.load_pretrained_shards(model, folder / "pytorch_model.bin")
    assert torch.equal(model.head.weight, state["head.weight"].bfloat16())
    with torch.device("meta"):
        empty = Tiny()
    with pytest.raises(CheckpointError, match="meta device"):
        deepspeed.load_pretrained_shards(empty, folder)


@on_ranks(2)
@pytest.mark.parametrize("where", ["header", "values"])
@pytest.mark.parametrize("kind", ["init", "stage 2", "stage 3"])
def test_what_one_rank_cannot_read_is_an_error_on_all(folder, where, kind):
    pretrained(folder, files=3)
    model = init_model() if kind == "init" else engine_of(tiny(), config(int(kind[-1])))
    with pytest.MonkeyPatch.context() as monkeypatch:
        if dist.get_rank() == 1:
            unreadable(folder / "model-00002-of-00003.safetensors", where, monkeypatch)
        with pytest.raises(CheckpointError, match=r"failed on rank 1: .*model-00002-of-00003.safetensors"):
            deepspeed.load_pretrained_shards(model, folder)
    assert deepspeed.load_pretrained_shards(model, folder) == ([], [], [])
    check(model if kind == "init" else model.module, {**tiny(11).state_dict(), "seen": torch.tensor(7.0)})


def unreadable(path, where, monkeypatch):
    """From now on, on this rank: "header", the file cannot be opened; "values", reading tensors fails."""
    from deepspeed.checkpoint import pretrained as module
    from deepspeed.checkpoint.foreign.tensor_ref import StorageRef
    owner, name = {"header": (module, "read_safetensors"), "values": (StorageRef, "read_into")}[where]
    real = getattr(owner, name)

    def read(first, *rest):
        mine = first.path if where == "values" else first
        if mine == str(path):
            raise OSError(errno.EACCES, "no rights here", mine)
        return real(first, *rest)

    monkeypatch.setattr(owner, name, read)


@on_ranks(1)
def test_bad_folders_are_named(folder):
    with pytest.raises(CheckpointError, match=str(folder)):
        deepspeed.load_pretrained_shards(tiny(), folder)
    index = Path(folder) / "model.safetensors.index.json"
    for text in ("", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": "../b.safetensors"}}', '{"weight_map": {"a": "/etc/passwd"}}',
                 '{"weight_map": {"a": 3}}', '{"weight_map": {"a": "gone.safetensors"}}', "[" * 100000):
        index.write_text(text)
        with pytest.raises(CheckpointError, match="index.json"):
            deepspeed.load_pretrained_shards(tiny(), folder)
    index.unlink()
    (Path(folder) / "model.safetensors").write_bytes(b"\xff" * 20)
    with pytest.raises(CheckpointError, match="model.safetensors"):
        deepspeed.load_pretrained_shards(tiny(), folder)
    (Path(folder) / "model.safetensors").unlink()
    for name in ("a.safetensors", "b.safetensors"):
        save(Path(folder) / name, {"head.weight": torch.ones(1, 9)})
    with pytest.raises(CheckpointError, match="head.weight"):
        deepspeed.load_pretrained_shards(tiny(), folder)
