# SPDX-License-Identifier: Apache-2.0
"""The plan's arithmetic against formulas by hand, and its answers to odd requests. Measured memory: tests/parity/test_plan.py."""
import pytest
import torch
from torch import nn

from deepspeed.planning import Room, plan
from deepspeed.planning.activations import activation_bytes
from deepspeed.planning.plan import RESERVED_BYTES
from deepspeed.planning.quantities import count, gib, size_bytes
from deepspeed.planning.shape import decoder, of_model

GIB = 2**30
BF16 = {"train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True}, "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
        "zero_optimization": {"stage": 3}}


def choices(*arguments, **more):
    return {c.name: c for c in plan(*arguments, **more).choices}


@pytest.mark.parametrize("params", [125_000_000, 7_000_000_000, 70_000_000_000])
def test_a_decoder_has_the_size_asked_for(params):
    shape = decoder(params)
    assert shape.numel == params == sum(p.numel for own in shape.params for p in own)
    assert shape.layers > 4 and 16 <= shape.hidden / shape.layers <= 256 and "--layers" in shape.assumed


def test_a_shape_that_is_given_is_taken():
    shape = decoder(6_700_000_000, layers=32, hidden=4096)
    assert (shape.layers, shape.hidden, shape.assumed) == (32, 4096, "")
    with pytest.raises(ValueError, match="32 layers of hidden size 8192 alone have .* --layers"):
        decoder(7_000_000_000, layers=32, hidden=8192)


def test_formulas():
    """bf16 with Adam: 2 bytes of parameter, 4 of gradient, 4 of master weight, 8 of state; padding is less than a thousandth."""
    psi, ranks = 7e9, 64
    found = choices(BF16, psi, gpus=ranks)
    shared = 16 / ranks
    for name, parameters, rest in (("stage 0", 2, 16), ("stage 1", 2, shared), ("stage 2", 2, shared), ("stage 3", 2 / ranks, shared)):
        use = found[name].device
        assert use["parameters"] == pytest.approx(parameters * psi, rel=1e-3)
        assert use["gradients"] + use["master_weights"] + use["optimizer_state"] == pytest.approx(rest * psi, rel=1e-3)
    assert found["stage 3"].configured and not found["stage 2"].configured
    ring = (ranks - 1) / ranks
    assert found["stage 0"].sent_bytes == pytest.approx((2 + 4) * psi * ring, rel=1e-3)  # the summed gradients travel in fp32
    assert found["stage 2"].sent_bytes == pytest.approx(2 * 2 * psi * ring, rel=1e-3)
    assert found["stage 3"].sent_bytes == pytest.approx(3 * 2 * psi * ring, rel=1e-3)


@pytest.mark.parametrize("devices, nodes", [(1, 1), (8, 1), (64, 8)])
def test_the_estimators_say_the_same(devices, nodes):
    from deepspeed.zero.estimates import estimate_zero2_model_states_mem_needs, estimate_zero3_model_states_mem_needs
    psi = 7e9
    found = choices(BF16, psi, gpus=devices, nodes=nodes)

    def states(name):
        use = found[name].device
        return sum(use[kind] for kind in ("parameters", "gradients", "master_weights", "optimizer_state"))

    def on_hosts(name, nodes):
        """Without staging, which the estimators' additional_buffer_factor pays for."""
        return found[name].host_bytes - found[name].host["staging"] * (devices // nodes)

    for name, offload in (("stage 2", False), ("stage 2, optimizer on host", True)):
        host, device = estimate_zero2_model_states_mem_needs(psi, devices // nodes, nodes, offload, additional_buffer_factor=1)
        assert states(name) == pytest.approx(device, rel=1e-3)
        if offload:
            loaded = 4 * psi * (devices // nodes)  # without zero.Init every process builds the model in fp32 first
            assert max(loaded, on_hosts(name, nodes)) == pytest.approx(host, rel=1e-3) and on_hosts(name, nodes) == pytest.approx(16 * psi / nodes, rel=1e-3)
    for name, offload, params in (("stage 3", False, False), ("stage 3, optimizer on host", True, False),
                                  ("stage 3, optimizer and parameters on host", True, True)):
        host, device, _ = estimate_zero3_model_states_mem_needs(psi, 0, devices // nodes, nodes, offload, params,
                                                                additional_buffer_factor=1)
        assert states(name) == pytest.approx(device, rel=1e-3)
        assert on_hosts(name, nodes) == pytest.approx(host if offload else 0, rel=1e-3)


@pytest.mark.parametrize("optimizer, values", [("Adam", 2), ("Lion", 1), ("SGD", 1), ("Adagrad", 1), ("Lamb", 2)])
def test_optimizer_state(optimizer, values):
    cfg = {**BF16, "optimizer": {"type": optimizer, "params": {"lr": 1e-4}}}
    use = choices(cfg, 1e9, gpus=2)["stage 0"].device
    assert use["optimizer_state"] == values * use["master_weights"]


def test_frozen_parameters_and_tied_ones():
    model = nn.Sequential(nn.Linear(1000, 1000, bias=False), nn.Linear(1000, 1000, bias=False), nn.Linear(1000, 1000, bias=False))
    model[2].weight = model[1].weight
    model[0].requires_grad_(False)
    shape = of_model(model)
    assert (shape.numel, shape.trained) == (2_000_000, 1_000_000)
    use = choices(BF16, model=model, gpus=2)["stage 2"].device
    assert use["parameters"] == pytest.approx(4e6, rel=1e-2) and use["master_weights"] == pytest.approx(2e6, rel=1e-2)


def test_integer_parameters_keep_their_type():
    model = nn.Linear(100, 100, bias=False)
    model.table = nn.Parameter(torch.zeros(6400, dtype=torch.int64), requires_grad=False)
    assert choices(BF16, model=model, gpus=1)["stage 0"].device["parameters"] == pytest.approx(2 * 10_000 + 8 * 6400, rel=1e-2)


def test_hybrid_sharding_cuts_over_fewer_ranks():
    cfg = {**BF16, "zero_optimization": {"stage": 3, "zero_hpz_partition_size": 8}}
    found = choices(cfg, 7e9, gpus=64)
    assert found["stage 3"].device["optimizer_state"] == pytest.approx(8 * 7e9 / 8, rel=1e-3)
    assert found["stage 2"].device["optimizer_state"] == pytest.approx(8 * 7e9 / 64, rel=1e-3)
    assert "reduce_replicas" in {row[0] for row in found["stage 3"].traffic}


def test_offload_as_it_is_configured():
    offload = {"offload_optimizer": {"device": "nvme", "nvme_path": "/x", "ratio": 0.5, "buffer_count": 6}, "offload_param": {"device": "cpu"}}
    cfg = {**BF16, "zero_optimization": {"stage": 3, **offload}}
    [configured] = [c for c in plan(cfg, 7e9, gpus=8).choices if c.configured]
    assert configured.name == "stage 3, optimizer on disk, parameters on host"
    assert configured.device["parameters"] == configured.device["optimizer_state"] == 0
    assert configured.settings() == {"stage": 3, **offload}
    # Shards on the host take all states with them; without, half of the states stay.
    assert configured.file["optimizer_state"] == pytest.approx(8 * 7e9 / 8, rel=1e-3)
    del cfg["zero_optimization"]["offload_param"]
    [configured] = [c for c in plan(cfg, 7e9, gpus=8).choices if c.configured]
    assert configured.file["optimizer_state"] == pytest.approx(4 * 7e9 / 8, rel=0.1)
    assert configured.device["optimizer_state"] + configured.file["optimizer_state"] == pytest.approx(8 * 7e9 / 8, rel=1e-3)


def test_bytes_of_each_tier():
    """24 bytes a parameter past the page cache; gradients down in 16 bits, weights up, shards up for forward and backward."""
    psi, ranks = 7e9, 8
    mine = psi / ranks
    found = choices({**BF16, "gradient_accumulation_steps": 3}, psi, gpus=ranks)
    tiers = found["stage 2, optimizer on disk"].tiers
    assert tiers["file_read"] == tiers["file_written"] == pytest.approx(12 * mine, rel=1e-3)
    assert tiers["to_host"] == pytest.approx(3 * 2 * mine, rel=1e-3) and tiers["from_host"] == pytest.approx(2 * mine, rel=1e-3)
    assert tiers["mapped_read"] == tiers["mapped_written"] == pytest.approx(3 * 4 * mine, rel=1e-3)
    assert found["stage 2, optimizer on disk"].disk_bytes == pytest.approx(16 * psi, rel=1e-3)
    tiers = found["stage 3, optimizer and parameters on host"].tiers
    assert tiers["from_host"] == pytest.approx(3 * 2 * 2 * mine, rel=1e-3) and tiers["file_read"] == tiers["mapped_read"] == 0
    assert found["stage 3"].host_link_bytes == found["stage 3"].streamed_bytes == found["stage 3"].mapped_bytes == 0
    disk = {c.name: c for c in plan(BF16, 7e8, gpus=2, device="cpu").choices}["stage 3, optimizer and parameters on disk"]
    assert disk.host_bytes == 0 and disk.device["staging"] == 4 * 3 * (4 << 20)  # buffer_count tiles of a master and two states
    assert disk.device_bytes == disk.device["staging"] + disk.device["gathered_units"] + disk.device["buckets"]


def test_what_stays_in_memory():
    zero = {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/x", "max_in_cpu": 10**8}}
    [configured] = [c for c in plan({**BF16, "zero_optimization": zero}, 7e8, gpus=2, device="cpu").choices if c.configured]
    assert 1.5e8 < configured.device["parameters"] <= 2e8
    assert configured.device["parameters"] + configured.file["parameters"] == pytest.approx(2 * 3.5e8, rel=1e-3)


def test_optimizers_whose_state_stays():
    found = choices({**BF16, "optimizer": {"type": "Lamb", "params": {"lr": 1e-4}}}, 7e9, gpus=8)
    assert all(bool(c.refused) == ("on " in name) for name, c in found.items())
    assert found["stage 3, optimizer on host"].misfit(Room()) == "Lamb's state cannot rest elsewhere"


def test_what_fits():
    made = plan(BF16, 7e9, gpus=8)

    def best(device, host=None, disk=None):
        found = made.best(Room(device * GIB, RESERVED_BYTES, host and host * GIB, disk and disk * GIB))
        return found and found.name

    assert best(80) == best(200) == "stage 1" and best(24) == "stage 3"
    assert best(8) == best(8, 200) == "stage 3, optimizer on host" and best(4, 200) == "stage 3, optimizer and parameters on host"
    assert best(8, 100) == best(8, 100, 300) == "stage 3, optimizer on disk"
    assert best(8, 100, 50) is None and best(1) is None
    stage3 = {c.name: c for c in made.choices}["stage 3"]
    assert "too much" in stage3.misfit(Room(8 * GIB)) and stage3.misfit(Room(80 * GIB)) == "" == stage3.misfit(Room())


def test_activations():
    shape = decoder(6_700_000_000, layers=32, hidden=4096)
    whole = activation_bytes(shape, 2048, 1, 2, recompute=False)
    assert whole == pytest.approx(32 * 34 * 2048 * 4096 + 2048 * shape.vocabulary * 10)
    assert activation_bytes(shape, 2048, 1, 2, recompute=True) < whole / 6
    assert activation_bytes(shape, 2048, 3, 2, recompute=False) == 3 * whole
    found = choices(BF16, 6.7e9, layers=32, hidden=4096, gpus=8, seq_length=2048)["stage 3"]
    assert found.activation_bytes == whole and found.device_bytes == sum(found.device.values()) + whole
    with pytest.raises(ValueError, match="--layers and --hidden"):
        plan(BF16, model=nn.Linear(2, 2), gpus=1, seq_length=2048)


@pytest.mark.parametrize("arguments, message", [
    ({}, "--params"), ({"params": 1e9, "model": nn.Linear(2, 2)}, "--params"),
    ({"params": 1e9, "gpus": 10, "nodes": 3}, "10 GPUs .* 3 nodes"),
    ({"params": 1e9, "gpus": 0}, "0 GPUs"), ({"model": nn.ReLU()}, "no parameters"),
])
def test_wrong_requests(arguments, message):
    with pytest.raises(ValueError, match=message):
        plan(BF16, **arguments)


def test_a_wrong_configuration_is_refused_as_always():
    from deepspeed.config import DeepSpeedConfigError
    with pytest.raises(DeepSpeedConfigError, match="zero_optimization.stage"):
        plan({**BF16, "zero_optimization": {"stage": 7}}, 1e9, gpus=2)


@pytest.mark.parametrize("text, value", [("7e9", 7 * 10**9), ("7B", 7 * 10**9), ("350M", 350 * 10**6), ("1.5k", 1500), (" 12 ", 12)])
def test_counts(text, value):
    assert count(text) == value


@pytest.mark.parametrize("text, value", [("80GB", 80 * GIB), ("80GiB", 80 * GIB), ("80g", 80 * GIB), ("512MB", 512 << 20),
                                         ("1.5 TB", 3 << 39), ("1048576", 1 << 20), ("80 B", 80)])
def test_sizes(text, value):
    assert size_bytes(text) == value


@pytest.mark.parametrize("text", ["", "many", "-3", "7X", "0", "1e40", "nan", "7e9.5"])
def test_not_a_number(text):
    with pytest.raises(ValueError, match="is not a"):
        count(text)


@pytest.mark.parametrize("text", ["80", " 80.5 ", "1000000", "8e1"])
def test_a_size_without_its_unit_is_refused(text):
    with pytest.raises(ValueError, match=f"'{text.strip()}' has no unit .*{text.strip()}GB"):
        size_bytes(text)


def test_sizes_are_shown_with_three_digits():
    assert [gib(n) for n in (0, GIB // 100, 2 * GIB, 12.34 * GIB, 123.4 * GIB)] == ["–", "0.01", "2.00", "12.3", "123"]
