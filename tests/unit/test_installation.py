# SPDX-License-Identifier: Apache-2.0
import json

import pytest
import torch

from deepspeed import git_version_info
from deepspeed.runtime import compiler, config_utils, constants
from deepspeed.utils.torch import required_torch_version


def test_git_version_info():
    assert git_version_info.version == "1.0.0" and git_version_info.accelerator_name in ("cpu", "cuda")
    assert set(git_version_info.torch_info) >= {"version", "cuda_version", "nccl_version", "bf16_support"}
    assert torch.__version__.startswith(git_version_info.torch_info["version"]) and git_version_info.installed_ops["cpu_adam"] in (True, False)


@pytest.mark.parametrize("installed,minimum,maximum,expected", [
    ("2.11.0+cu130", "2.11", None, True), ("2.11.0+cu130", "2.9", None, True), ("2.9.1", "2.11", None, False), ("2.11.0", 2.1, None, True),
    ("2.11.0", None, "2.11", True), ("2.11.1", None, "2.11.0", False), ("2.11.0", "2.0", "3.0", True), ("3.1.0", "2.0", "3.0", False),
])
def test_required_torch_version(monkeypatch, installed, minimum, maximum, expected):
    monkeypatch.setattr(torch, "__version__", installed)
    assert required_torch_version(min_version=minimum, max_version=maximum) is expected


def test_required_torch_version_needs_a_bound():
    with pytest.raises(ValueError, match="min_version, max_version"):
        required_torch_version()


def test_compiler_decorators():
    assert compiler.is_compile_supported() and not compiler.is_compiling()
    assert compiler.disable(lambda x: x + 1)(1) == 2
    assert compiler.enable(min_version="2.0")(len) is len and compiler.enable()(len) is len
    assert compiler.enable(min_version="99.0")(abs)(-1) == 1


def test_config_helpers():
    assert config_utils.get_scalar_param({"a": 1}, "a", 2) == 1 and config_utils.get_dict_param({}, "a", 2) == 2
    with pytest.raises(ValueError, match="duplicate keys in a JSON object: 'a'"):
        json.loads('{"a": 1, "a": 2}', object_pairs_hook=config_utils.dict_raise_error_on_duplicate_keys)
    assert json.loads('{"a": 1}', object_pairs_hook=config_utils.dict_raise_error_on_duplicate_keys) == {"a": 1}
    assert repr(config_utils.pp_int(1234567)) == "1,234,567" and repr(config_utils.pp_int(5, "five")) == "five"
    assert config_utils.pp_int(2) + 1 == 3


def test_scientific_notation_is_still_json():
    document = {"big": 500000000, "small": 3, "flag": True, "none": None, "list": [1, 2e6], "empty": {}, "inner": {"text": 'a"b', "inf": 1e-3}}
    text = json.dumps(document, cls=config_utils.ScientificNotationEncoder)
    assert '"big": 5.000000e+08' in text and '"small": 3' in text and json.loads(text) == document


def test_constants_are_keys():
    assert constants.TRAIN_BATCH_SIZE == "train_batch_size" and constants.ROUTE_TRAIN == "train" and constants.OPTIMIZER == "optimizer"
    assert constants.BFLOAT16 == "bf16" and constants.CHECKPOINT_TAG_VALIDATION == "tag_validation"


def test_values_of_old_enums():
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum, OffloadStateTypeEnum
    from deepspeed.utils.types import ActivationFuncType, NormType

    assert ZeroStageEnum(3) is ZeroStageEnum.weights is ZeroStageEnum.max_stage and ZeroStageEnum.gradients == 2
    assert [device.value for device in OffloadDeviceEnum] == ["none", "cpu", "nvme"] and OffloadDeviceEnum.cpu == "cpu"
    assert {state.value for state in OffloadStateTypeEnum} == {"optim_states", "hp_params", "lp_params", "lp_grads", "contiguous_grad_buffer"}
    assert ActivationFuncType.GATED_SILU == 4 and NormType.RMSNorm == 3


def test_things_checkpoints_pickle():
    import pickle

    from deepspeed.utils.tensor_fragment import fragment_address, tensor_fragment

    address = pickle.loads(pickle.dumps(fragment_address(numel=3, start=1)))
    assert address == fragment_address(3, 1)
    low, high = torch.zeros(3, dtype=torch.bfloat16), torch.ones(3)
    fragment = tensor_fragment(low, address, high, fragment_address(3, 0))
    fragment.update_lp()
    assert low.tolist() == [1, 1, 1] and fragment.get_hp_fragment() is high and fragment.get_lp_fragment_address() is address
    low.fill_(2)
    fragment.update_hp()
    assert high.tolist() == [2, 2, 2]


def test_sections_by_hand():
    from deepspeed.config import DeepSpeedConfigError
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig, get_zero_config
    from deepspeed.runtime.zero.leaf_module_config import DEFAULT_LEAF_MODULE_CLASSES, DeepSpeedZeroLeafModuleConfig
    from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadParamConfig

    section = DeepSpeedZeroConfig(stage=3, reduce_bucket_size=1e6)
    assert section.stage == 3 and section.reduce_bucket_size == 1000000 and isinstance(section, DeepSpeedZeroConfig)
    assert get_zero_config({}).stage == 0 and get_zero_config({"zero_optimization": {"stage": 2}}).stage == 2
    assert DeepSpeedZeroLeafModuleConfig(names=["a.b"]).names == ["a.b"] and len(DEFAULT_LEAF_MODULE_CLASSES) == 3
    assert DeepSpeedZeroOffloadParamConfig().device == "none"
    with pytest.raises(DeepSpeedConfigError, match="zero_optimization.stge"):
        DeepSpeedZeroConfig(stge=3)


def test_recognising_parameters_and_optimizers():
    from deepspeed.runtime.zero.utils import ZeRORuntimeException, is_zero_param, is_zero_supported_optimizer

    parameter = torch.nn.Parameter(torch.ones(1))
    assert not is_zero_param(parameter) and not is_zero_param(3)
    parameter.ds_id = 0
    assert is_zero_param(parameter) and issubclass(ZeRORuntimeException, Exception)
    assert is_zero_supported_optimizer(torch.optim.AdamW([parameter])) and not is_zero_supported_optimizer(torch.optim.LBFGS([parameter]))
