# SPDX-License-Identifier: Apache-2.0
"""Feeding the engine: each rank's share of a data set, in a known order, resumable at the exact sample."""

from .loader import DeepSpeedDataLoader, RepeatingLoader
from .sampler import ResumableDistributedSampler

__all__ = ["DeepSpeedDataLoader", "RepeatingLoader", "ResumableDistributedSampler"]
