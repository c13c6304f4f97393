# SPDX-License-Identifier: Apache-2.0
"""Fused operations. Nothing is imported before it is asked for."""
from deepspeed._lazy import attach, names

_MODULES = ("activations", "adagrad", "adam", "aio", "cross_entropy", "fp_quantizer", "lamb", "lion", "multi_tensor", "muon", "normalization",
            "op_builder", "quantizer", "rope", "sgd", "softmax")

__getattr__, __dir__, __all__ = attach(__name__, {
    **names("deepspeed.ops.replace", "replace_modules", "restore_modules"),
    **{name: f"deepspeed.ops.{name}" for name in _MODULES},
    "__compatible_ops__": "deepspeed.ops.op_builder.all_ops:COMPATIBLE_OPS",
})
