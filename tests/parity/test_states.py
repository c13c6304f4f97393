# SPDX-License-Identifier: Apache-2.0
"""iter_full_params() streams whole parameters in bounded memory; offload_states() frees memory and reload_states() brings back every bit."""
import pytest
import torch
import torch.distributed as dist
from torch import nn

from deepspeed.runtime.zero.offload_config import OffloadStateTypeEnum
from tests.parity.launch import on_ranks
from tests.parity.tiny import assert_same, batch, config, engine_of, tiny, train, whole


def big(layers=8, width=192):
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(layers)), nn.Linear(width, 1))


# ------------------------------------------------------------------------------------------------------------------- streaming

@on_ranks(2)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("bucket_bytes", [1, 5000, 1 << 30])
def test_every_parameter_once_in_order(stage, bucket_bytes):
    engine = engine_of(tiny(), config(stage))
    train(engine, 2)
    wanted = whole(engine.module)
    found = [(name, value.clone()) for name, value in engine.iter_full_params(bucket_bytes=bucket_bytes)]
    assert [name for name, _ in found] == [name for name, _ in engine.module.named_parameters()]
    assert_same(dict(found), wanted)
    train(engine, 1)


@on_ranks(2)
def test_memory_stays_within_the_bucket():
    engine = engine_of(big(), config(3, zero={"stage3_prefetch_bucket_size": 1 << 16, "stage3_param_persistence_threshold": 0}))
    store = engine._managed.store
    total = sum(p.numel() * 4 for p in engine.module.parameters())
    bucket = 4 * 192 * 193 * 4
    assert bucket < total / 2
    engine.empty_partition_cache()
    most = 0
    for _ in engine.iter_full_params(bucket_bytes=bucket):
        most = max(most, store.gathered_bytes())
    assert bucket / 2 < most <= bucket + 4096
    assert store.gathered_bytes() <= bucket


@on_ranks(2)
def test_a_caller_may_stop_and_a_kept_tensor_keeps_its_values():
    engine = engine_of(tiny(), config(3))
    wanted = whole(engine.module)
    stream = engine.iter_full_params(bucket_bytes=1)
    name, value = next(stream)
    next(stream)
    stream.close()
    assert torch.equal(value, wanted[name])
    assert_same(whole(engine.module), wanted)
    train(engine, 2)


# ------------------------------------------------------------------------------------------------------------------- states

def resident_bytes():
    """Of this process, memory shared with others included."""
    with open("/proc/self/status") as file:
        fields = dict(line.split(":", 1) for line in file)
    return 1024 * (int(fields["RssAnon"].split()[0]) + int(fields["RssShmem"].split()[0]))


def states_of(engine):
    return {name: {key: value.clone() for key, value in entry.items() if torch.is_tensor(value)}
            for name, entry in engine.optimizer.state_dict()["state"].items()}


@on_ranks(2)
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("bf16", [False, True])
def test_states_in_a_file(stage, bf16, tmp_path):
    settings = dict(zero={"offload_optimizer": {"device": "none", "nvme_path": str(tmp_path)}}, **({"bf16": {"enabled": True}} if bf16 else {}))
    losses = []
    for away in (False, True):
        engine = engine_of(tiny(), config(stage, **settings))
        for step in range(3):
            if away:
                engine.offload_states(device="nvme")
                engine.reload_states()
            losses.append(train(engine, 1))
        before, weights = states_of(engine), whole(engine.module)
        if away:
            engine.offload_states(device="nvme")
            for call in (engine.step, lambda: engine(batch(0)), lambda: engine.save_checkpoint(tmp_path), lambda: list(engine.iter_full_params())):
                with pytest.raises(RuntimeError, match="reload_states"):
                    call()
            engine.reload_states()
        after = states_of(engine)
        assert before.keys() == after.keys()
        for name in before:
            assert_same(before[name], after[name])
        assert_same(weights, whole(engine.module))
    assert losses[:3] == losses[3:]


@on_ranks(2, timeout=120)
@pytest.mark.parametrize("stage", [2, 3])
def test_memory_is_freed(stage, tmp_path):
    width = 1400
    model = nn.Sequential(*(nn.Linear(width, width) for _ in range(4)))
    numel = 4 * width * (width + 1)
    engine = engine_of(model, config(stage, zero={"offload_optimizer": {"device": "none", "nvme_path": str(tmp_path)}}))
    x = torch.randn(4, width)
    for _ in range(2):
        engine.backward(engine(x).square().mean())
        engine.step()
    rest = numel * 4 * (1 if stage < 3 else 0.5) + 2 * numel * 4 * 0.5   # weights, two moments
    before = resident_bytes()
    engine.offload_states(device="nvme")
    freed = before - resident_bytes()
    assert freed > 0.9 * rest
    engine.reload_states()
    engine.backward(engine(x).square().mean())
    engine.step()


@on_ranks(2)
def test_what_is_asked_for(tmp_path):
    engine = engine_of(tiny(), config(3))
    train(engine, 1)
    engine.offload_states()
    engine.reload_states()
    engine.offload_states(device="none")
    engine.offload_states(include=[OffloadStateTypeEnum.optim_states, "lp_grads"], device=torch.device("cpu"), pin_memory=False, non_blocking=True)
    engine.reload_states(non_blocking=True)
    with pytest.raises(ValueError, match="nvme_path"):
        engine.offload_states(device="nvme")
    with pytest.raises(ValueError, match="optim_states"):
        engine.offload_states(include=["everything"])
    train(engine, 1)
    assert dist.get_world_size() == 2
