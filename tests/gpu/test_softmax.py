# SPDX-License-Identifier: Apache-2.0
"""The tests of softmax's operator with tensors on a GPU."""
import pytest
import torch

from tests.unit.ops.test_softmax import *  # noqa: F401,F403

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
del test_module_says_what_it_is, test_threads_change_no_bit  # noqa: F821  (nothing of theirs is on a device)


@pytest.fixture
def device():
    return "cuda"
