# SPDX-License-Identifier: Apache-2.0
"""Stochastic gradient descent with momentum."""
from deepspeed.ops.sgd.fused_sgd import FusedSGD

__all__ = ["FusedSGD"]
