# SPDX-License-Identifier: Apache-2.0
"""Import path users have; the code is in deepspeed.checkpointing."""
from deepspeed._lazy import alias

alias(__name__, "deepspeed.checkpointing.offload_activations")
