# SPDX-License-Identifier: Apache-2.0
"""Import path users have for clone_tensors_for_torch_save."""
from deepspeed.checkpoint.clone import clone_tensors_for_torch_save  # noqa: F401
