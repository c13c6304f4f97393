# SPDX-License-Identifier: Apache-2.0
"""Import path users have; the code is in deepspeed.zero and deepspeed.device."""
from deepspeed._lazy import attach, mirror, names

__getattr__, __dir__, __all__ = attach(__name__, {
    **names("deepspeed.zero.init",
            "Init", "shutdown_init_context", "restore_init_context", "zero_wrapper_for_fp_tensor_constructor",
            "_orig_torch_tensor", "_orig_torch_empty", "_orig_torch_zeros", "_orig_torch_ones", "_orig_torch_full",
            "_orig_torch_arange", "_orig_torch_eye", "_orig_torch_randn"),
    **names("deepspeed.zero.gathered", "GatheredParameters"),
    **names("deepspeed.zero.external", "register_external_parameter", "unregister_external_parameter"),
    **names("deepspeed.zero.status", "ZeroParamStatus", "ZeroParamType", "DeepSpeedTensorOverride"),
    **names("deepspeed.device", "get_accelerator"),
})
# transformers replaces zero_wrapper_for_fp_tensor_constructor here while zero.Init is active.
mirror(__name__, "deepspeed.zero.init")
