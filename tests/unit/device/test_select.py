# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from deepspeed.accelerator import DeepSpeedAccelerator, get_accelerator, is_current_accelerator_supported, set_accelerator
from deepspeed.device.cpu import CPU_Accelerator


@pytest.fixture(autouse=True)
def fresh_choice():
    before = get_accelerator()
    set_accelerator(None)
    yield
    set_accelerator(before)


def test_environment_chooses(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert get_accelerator()._name == "cpu" and get_accelerator() is get_accelerator() and is_current_accelerator_supported()


def test_unknown_device(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "toaster")
    with pytest.raises(ValueError, match="DS_ACCELERATOR='toaster' is not supported; one of cuda, cpu is"):
        get_accelerator()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_cuda_asked_for_and_none_there(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    with pytest.raises(RuntimeError, match="DS_ACCELERATOR=cuda, but"):
        get_accelerator()


def test_detection(monkeypatch):
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert get_accelerator()._name == "cuda"
    set_accelerator(None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert get_accelerator()._name == "cpu"


def test_a_device_of_ones_own():
    class Mine(CPU_Accelerator):
        _name = "mine"

    mine = Mine()
    set_accelerator(mine)
    assert get_accelerator() is mine and not is_current_accelerator_supported()
    with pytest.raises(TypeError, match="instance of DeepSpeedAccelerator, got ABCMeta"):
        set_accelerator(Mine)


def test_old_import_paths():
    from deepspeed.accelerator.abstract_accelerator import DeepSpeedAccelerator as abstract
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator as cpu
    from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator as cuda
    from deepspeed.accelerator.real_accelerator import get_accelerator as real

    assert abstract is DeepSpeedAccelerator and real is get_accelerator and issubclass(cpu, abstract) and issubclass(cuda, abstract)
