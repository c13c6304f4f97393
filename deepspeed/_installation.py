# SPDX-License-Identifier: Apache-2.0
"""Facts about this installation that need torch or the compiled modules to be told."""
import importlib.util

import torch

from deepspeed.device.select import get_accelerator

torch_info = {
    "version": ".".join(torch.__version__.split("+")[0].split(".")[:2]),
    "bf16_support": get_accelerator().is_bf16_supported() if get_accelerator()._name == "cpu" else torch.cuda.is_available(),
    "cuda_version": torch.version.cuda or "0.0",
    "nccl_version": ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else "0.0",
    "hip_version": torch.version.hip or "0.0",
}
accelerator_name = get_accelerator()._name
_compiled = importlib.util.find_spec("deepspeed._C") is not None
installed_ops = dict.fromkeys(("cpu_adam", "cpu_adagrad", "cpu_lion", "fused_adam", "fused_lamb", "fused_lion"), _compiled)
