# SPDX-License-Identifier: Apache-2.0
"""What every description of a tensor in a file can say of itself: properties for classes that have `shape` and `dtype`."""
import math

from deepspeed.checkpoint import dtypes

numel = property(lambda tensor: math.prod(tensor.shape), doc="Count of elements.")
item_bytes = property(lambda tensor: dtypes.item_bytes(tensor.dtype), doc="Bytes of one element.")
nbytes = property(lambda tensor: tensor.numel * dtypes.item_bytes(tensor.dtype), doc="Bytes of all elements.")
