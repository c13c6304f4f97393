# SPDX-License-Identifier: Apache-2.0
"""Where programs look for operations that elsewhere are compiled at first use. Here they are part of the package."""
from deepspeed._lazy import attach, names

__getattr__, __dir__, __all__ = attach(__name__, names("deepspeed.ops.aio", "AsyncIOBuilder"))
