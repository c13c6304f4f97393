# SPDX-License-Identifier: Apache-2.0
"""from_pretrained under HfDeepSpeedConfig gives the weights that it gives without, and each rank reads its own part of the files."""
import importlib.util
import os
import tempfile

import pytest
import torch
import torch.distributed as dist

from tests.parity.launch import on_ranks

if importlib.util.find_spec("transformers") is None or importlib.util.find_spec("accelerate") is None:
    pytest.skip("transformers or accelerate is not installed", allow_module_level=True)

import deepspeed  # noqa: E402
from tests.compat.hf import models, training  # noqa: E402

TIMEOUT_S = 170


@pytest.fixture
def folder():
    with tempfile.TemporaryDirectory(prefix="hf-load-") as path:
        yield path


def load(model_class, path, sharded, dtype_section=None, **arguments):
    """(model, its whole state by name, missing and mismatched names)"""
    from transformers.integrations import HfDeepSpeedConfig
    training.forget_accelerate()
    kept = None
    if sharded:
        kept = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1, **(dtype_section or {})})
    torch.manual_seed(11)
    model, report = model_class.from_pretrained(path, output_loading_info=True, **arguments)
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        state = {name: value.detach().clone() for name, value in model.state_dict().items()}
        loose = {name: value.clone() for name, value in model.named_buffers()}
    del kept
    training.forget_accelerate()
    return model, {**state, **loose}, (sorted(report["missing_keys"]), sorted(str(entry) for entry in report["mismatched_keys"]))


def same(found, wanted):
    assert found.keys() == wanted.keys()
    wrong = [name for name in wanted if found[name].dtype != wanted[name].dtype or not torch.equal(found[name], wanted[name])]
    assert wrong == []


def save(folder, name, **arguments):
    path = os.path.join(folder, name)
    if dist.get_rank() == 0:
        models.build(name).save_pretrained(path, max_shard_size="40KB", **arguments)
    dist.barrier()
    return path


def bytes_read():
    with open("/proc/self/io") as file:
        return int(file.readline().split()[1])


@on_ranks(2, timeout=TIMEOUT_S)
@pytest.mark.parametrize("part", range(4))
def test_every_architecture_is_loaded_as_without_us(part, folder):
    for name in list(models.ARCHITECTURES)[part::4]:
        path = save(folder, name)
        _, wanted, told = load(models.model_class(name), path, False)
        model, found, tells = load(models.model_class(name), path, True)
        same(found, wanted)
        assert tells == told, name
        sharded = [p for p in model.parameters() if hasattr(p, "ds_tensor")]
        assert sum(p.ds_tensor.numel() for p in sharded) <= 0.6 * sum(p.ds_numel for p in sharded) + 64 * len(sharded), name


@on_ranks(2, timeout=TIMEOUT_S)
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_a_rank_reads_its_part_of_the_files(name, folder):
    """Also of experts that lie in the files one by one and in the model in one tensor."""
    from transformers import AutoConfig
    config = models.configuration(name)
    config.hidden_size, config.intermediate_size, config.vocab_size = 256, 640, 4000
    path = os.path.join(folder, name)
    if dist.get_rank() == 0:
        models.model_class(name)(config).save_pretrained(path)
    dist.barrier()
    AutoConfig.from_pretrained(path)
    size = sum(os.path.getsize(os.path.join(path, file)) for file in os.listdir(path) if file.endswith(".safetensors"))
    load(models.model_class(name), path, True)   # whatever is imported on the way is read now
    before = bytes_read()
    load(models.model_class(name), path, True)
    assert bytes_read() - before < 0.5 * size + (1 << 20)


@on_ranks(2, timeout=TIMEOUT_S)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_dtype_is_the_callers_or_the_configurations(dtype, folder):
    path = save(folder, "qwen2-moe")
    wanted_class = models.model_class("qwen2-moe")
    _, wanted, _ = load(wanted_class, path, False, dtype=getattr(torch, dtype))
    same(load(wanted_class, path, True, dtype=getattr(torch, dtype))[1], wanted)
    section = {"bfloat16": "bf16", "float16": "fp16"}.get(dtype)
    if section:
        found = load(wanted_class, path, True, {section: {"enabled": True}}, dtype=getattr(torch, dtype))[1]
        same({name: value for name, value in found.items() if name in wanted}, wanted)


@on_ranks(2, timeout=TIMEOUT_S)
def test_new_heads_are_initialised_alike_everywhere(folder):
    """The head is not in the files, or has another shape there."""
    import transformers
    path = save(folder, "bert")
    for model_class, arguments in ((transformers.BertForSequenceClassification, dict(num_labels=7, ignore_mismatched_sizes=True)),
                                   (transformers.BertForMaskedLM, dict())):
        _, wanted, told = load(model_class, path, False, **arguments)
        _, found, tells = load(model_class, path, True, **arguments)
        same(found, wanted)
        assert tells == told
        for value in found.values():
            first = value.clone()
            dist.broadcast(first, 0)
            assert torch.equal(first, value)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        load(transformers.BertForSequenceClassification, path, True, num_labels=7)


@on_ranks(2, timeout=TIMEOUT_S)
def test_the_base_of_a_model_and_a_model_on_a_base(folder):
    import transformers
    path = save(folder, "llama-tied")
    same(load(transformers.LlamaModel, path, True)[1], load(transformers.LlamaModel, path, False)[1])
    base = os.path.join(folder, "base")
    if dist.get_rank() == 0:
        transformers.LlamaModel.from_pretrained(path).save_pretrained(base)
    dist.barrier()
    found, wanted = (load(transformers.LlamaForCausalLM, base, sharded)[1] for sharded in (True, False))
    same(found, wanted)


@on_ranks(2, timeout=TIMEOUT_S)
def test_other_files_are_loaded_the_old_way(folder):
    path = os.path.join(folder, "bin")
    if dist.get_rank() == 0:
        model = models.build("llama")
        model.save_pretrained(path)
        os.remove(os.path.join(path, "model.safetensors"))
        torch.save(model.state_dict(), os.path.join(path, "pytorch_model.bin"))
    dist.barrier()
    found, wanted = (load(models.model_class("llama"), path, sharded)[1] for sharded in (True, False))
    same(found, wanted)


@on_ranks(2, timeout=TIMEOUT_S)
@pytest.mark.parametrize("what", ["headers", "conversions"])
def test_what_one_rank_cannot_read_by_slices_all_load_the_old_way(what, folder):
    from deepspeed.checkpoint import transformers_loading
    from deepspeed.checkpoint.source import CheckpointError
    path = save(folder, "llama")
    wanted = load(models.model_class("llama"), path, False)[1]
    filled = []

    def unreadable(file):
        raise CheckpointError(f"{file}: no rights here")

    def converts_badly(*arguments):
        return None, None, "'lm_head' is not converted"

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(transformers_loading, "fill", lambda *_: filled.append(True))
        if dist.get_rank() == 1:
            if what == "headers":
                monkeypatch.setattr(transformers_loading, "read_safetensors", unreadable)
            else:
                monkeypatch.setattr(transformers_loading, "_planned", converts_badly)
        found = load(models.model_class("llama"), path, True)[1]
    same(found, wanted)
    assert not filled


@on_ranks(2, timeout=TIMEOUT_S)
def test_values_that_one_rank_cannot_read_are_an_error_on_all(folder):
    from deepspeed.checkpoint.foreign.tensor_ref import StorageRef
    from deepspeed.checkpoint.source import CheckpointError
    path = save(folder, "llama")

    def unreadable(storage, *_):
        raise OSError(13, "no rights here", storage.path)

    with pytest.MonkeyPatch.context() as monkeypatch:
        if dist.get_rank() == 1:
            monkeypatch.setattr(StorageRef, "read_into", unreadable)
        with pytest.raises(CheckpointError, match="failed on rank 1: .*safetensors: no rights here"):
            load(models.model_class("llama"), path, True)
    training.forget_accelerate()
