# SPDX-License-Identifier: Apache-2.0
"""The random generators a training loop draws from."""
import random

import numpy
import torch

from deepspeed.checkpointing import get_cuda_rng_tracker


def capture():
    """The state of every generator of this rank."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = numpy.random.get_state()
    state = {
        "python": {"version": version, "words": numpy.array(words, dtype=numpy.uint32), "gauss": gauss},
        "numpy": {"name": name, "keys": keys, "position": position, "has_gauss": has_gauss, "cached": cached},
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    tracked = get_cuda_rng_tracker().get_states()
    if tracked:
        state["tracked"] = dict(tracked)
    return state


def restore(state):
    """Continues where capture() was called."""
    python, legacy = state["python"], state["numpy"]
    random.setstate((python["version"], tuple(int(word) for word in python["words"]), python["gauss"]))
    numpy.random.set_state((legacy["name"], legacy["keys"], legacy["position"], legacy["has_gauss"], legacy["cached"]))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    if "tracked" in state:
        get_cuda_rng_tracker().set_states(state["tracked"])
