# SPDX-License-Identifier: Apache-2.0
"""The tests of backwards in place with tensors on a GPU."""
import pytest
import torch

from tests.unit.ops.test_in_place import *  # noqa: F401,F403

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
del test_memory_of_a_backward  # noqa: F821  (counts what the CPU's allocator gives)


@pytest.fixture
def device():
    return "cuda"
