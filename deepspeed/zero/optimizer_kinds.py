# SPDX-License-Identifier: Apache-2.0
"""The optimizer classes of the single stages, for callers that ask `isinstance(engine.optimizer, ...)`.

There is one class of optimizer here, ShardedOptimizer. These names answer by how an object is laid out: what is partitioned, and
what happens to gradients that are not finite. They cannot be constructed.
"""
from deepspeed.zero.optimizer import ShardedOptimizer, ZeROOptimizer


class _Kind(type):
    def __instancecheck__(cls, thing):
        return isinstance(thing, ShardedOptimizer) and cls.fits(thing)

    def __call__(cls, *args, **kwargs):
        raise TypeError(f"{cls.__name__} is not constructed by hand: deepspeed.initialize() returns the optimizer")


class DeepSpeedZeroOptimizer_Stage3(ZeROOptimizer, metaclass=_Kind):
    """Parameters, gradients and states are partitioned."""

    @staticmethod
    def fits(optimizer):
        return optimizer.managed.sharded_api


class DeepSpeedZeroOptimizer(ZeROOptimizer, metaclass=_Kind):
    """States, and at stage 2 gradients, are partitioned; parameters are whole."""

    @staticmethod
    def fits(optimizer):
        return optimizer.options.partial_slices and not optimizer.managed.sharded_api


class BF16_Optimizer(ZeROOptimizer, metaclass=_Kind):
    """bf16 parameters, nothing partitioned."""

    @staticmethod
    def fits(optimizer):
        return not optimizer.options.partial_slices and optimizer.options.on_bad == "skip"


class FP16_Optimizer(ZeROOptimizer, metaclass=_Kind):
    """fp16 parameters, nothing partitioned."""

    @staticmethod
    def fits(optimizer):
        return not optimizer.options.partial_slices and optimizer.options.on_bad == "scale"


FP16_UnfusedOptimizer = FP16_Optimizer
