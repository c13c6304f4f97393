# SPDX-License-Identifier: Apache-2.0
"""Fused operations. Nothing is imported before it is asked for."""
from deepspeed._lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, {
    name: f"deepspeed.ops.{name}"
    for name in ("activations", "adagrad", "adam", "cross_entropy", "fp_quantizer", "lamb", "lion", "multi_tensor", "muon", "normalization", "quantizer",
                 "rope", "sgd", "softmax")
})
