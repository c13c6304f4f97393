# SPDX-License-Identifier: Apache-2.0
"""Import path users have: this is the module deepspeed.checkpointing, so that what is set on one is seen through the other."""
from deepspeed._lazy import alias

alias(__name__, "deepspeed.checkpointing")
