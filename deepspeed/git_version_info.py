# SPDX-License-Identifier: Apache-2.0
"""What is installed: version, source revision, which optional parts can work here."""
import importlib.util

from deepspeed._lazy import attach
from deepspeed._version import __version__ as version  # noqa: F401

git_hash = "unknown"
git_branch = "unknown"
HAS_TRITON = importlib.util.find_spec("triton") is not None

__getattr__, __dir__, _lazy_names = attach(__name__, {
    "torch_info": "deepspeed._installation:torch_info",
    "accelerator_name": "deepspeed._installation:accelerator_name",
    "installed_ops": "deepspeed._installation:installed_ops",
})

__all__ = ["version", "git_hash", "git_branch", "HAS_TRITON", *_lazy_names]
