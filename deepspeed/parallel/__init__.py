# SPDX-License-Identifier: Apache-2.0
"""Splitting a model over ranks: the parts every kind of it needs."""
from deepspeed._lazy import attach, names

__getattr__, __dir__, __all__ = attach(__name__, {
    **names("deepspeed.parallel.partition", "partition_uniform", "partition_balanced", "prefix_sum_inc"),
    **names("deepspeed.parallel.partitioned_tensor", "PartitionedTensor"),
    **names("deepspeed.parallel.module_tree", "recursive_getattr", "recursive_setattr"),
})
