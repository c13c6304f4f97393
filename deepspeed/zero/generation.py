# SPDX-License-Identifier: Apache-2.0
"""Generating text from a sharded model without gathering at every token."""
import contextlib

from deepspeed.zero.gathered import GatheredParameters


@contextlib.contextmanager
def unwrap_model_for_generation(model):
    """Yields the bare module with all parameters whole; the memory must hold them. Collective."""
    module = model.module if hasattr(model, "module") else model
    with GatheredParameters(module.parameters()):
        yield module
