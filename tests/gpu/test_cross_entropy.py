# SPDX-License-Identifier: Apache-2.0
"""The tests of cross-entropy's operators with tensors on a GPU."""
import pytest
import torch

from tests.unit.ops.test_cross_entropy import *  # noqa: F401,F403

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
del test_threads_change_no_bit_of_the_rows  # noqa: F821  (nothing of it is on a device)


@pytest.fixture
def device():
    return "cuda"
