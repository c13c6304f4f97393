# SPDX-License-Identifier: Apache-2.0
"""Adagrad."""
from deepspeed.ops.adagrad.cpu_adagrad import DeepSpeedCPUAdagrad

__all__ = ["DeepSpeedCPUAdagrad"]
