# SPDX-License-Identifier: Apache-2.0
"""What the two sections of the configuration mean on each kind of device."""
import pytest
import torch

from deepspeed._native import lib
from deepspeed.config import load_config
from deepspeed.zero.tiers import IN_MEMORY, tiers_of

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def tiers(device, optimizer=None, param=None, stage=3, with_optimizer=True, **more):
    zero = {"stage": stage, **({"offload_optimizer": optimizer} if optimizer else {}), **({"offload_param": param} if param else {})}
    return tiers_of(load_config({"zero_optimization": zero, **more}, world_size=1, device=device.type, batch_required=False), device, with_optimizer)


def test_nothing_asked_for():
    assert tiers(CPU) == tiers(CUDA) == IN_MEMORY


def test_the_host_is_where_the_cpu_trains_anyway():
    assert tiers(CPU, {"device": "cpu"}, {"device": "cpu"}) == IN_MEMORY


def test_below_its_stage_a_section_means_nothing(tmp_path):
    files = {"device": "nvme", "nvme_path": str(tmp_path)}
    assert tiers(CPU, files, files, stage=0) == IN_MEMORY
    assert not tiers(CPU, files, files, stage=2).moves_parameters


def test_a_gpu_and_the_host():
    found = tiers(CUDA, {"device": "cpu", "ratio": 0.25})
    assert isinstance(found.rest, lib().HostRest) and found.rest.apart and found.rest_share == 0.25 and not found.moves_parameters
    found = tiers(CUDA, {"device": "cpu"}, {"device": "cpu"})
    assert isinstance(found.rest, lib().HostRest) and isinstance(found.parameter_rest, lib().HostRest) and found.moves_parameters


def test_the_state_follows_the_parameters():
    found = tiers(CUDA, None, {"device": "cpu"})
    assert isinstance(found.rest, lib().HostRest) and found.rest_share == 1.0
    assert tiers(CUDA, None, {"device": "cpu"}, with_optimizer=False).rest is None


@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
def test_files(device, tmp_path):
    files = {"device": "nvme", "nvme_path": str(tmp_path / "made" / "here"), "buffer_count": 7}
    found = tiers(device, files, {**{k: files[k] for k in ("device", "nvme_path")}, "max_in_cpu": 10}, aio={"block_size": 10000, "queue_depth": 3})
    assert (tmp_path / "made" / "here").is_dir()
    assert found.rest.folder == files["nvme_path"] and found.rest.apart == (device is CUDA) and found.rest.stream_bytes == 3 * 7 * (4 << 20)
    if device is CUDA:
        assert found.parameter_rest.folder == files["nvme_path"] and not found.parameter_folder
    else:
        assert found.parameter_folder == files["nvme_path"] and found.parameters_in_memory == 10 and found.parameter_rest is None


def test_values_that_rest_are_tensors_like_others(tmp_path):
    for rest in (lib().HostRest(False, 4096), tiers(CPU, {"device": "nvme", "nvme_path": str(tmp_path)}).rest):
        value = rest.zeros(1000, torch.float32)
        assert rest.holds(value) and rest.holds(value[10:]) and not rest.holds(torch.zeros(4))
        assert not value.any()
        value += torch.arange(1000)
        rest.leave(value)
        rest.leave_all()
        assert torch.equal(value, torch.arange(1000).float())
        kept = value[5:]
        del value, rest   # the memory stays with who looks at it
        assert kept[0] == 5
