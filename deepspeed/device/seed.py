# SPDX-License-Identifier: Apache-2.0
"""One seed for every generator."""
import random
import sys


def set_random_seed(seed):
    """Seeds Python, NumPy (where it is loaded), torch and the accelerator."""
    import torch

    from deepspeed.device.select import get_accelerator

    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed % 2**32)
    torch.manual_seed(seed)
    get_accelerator().manual_seed_all(seed)
